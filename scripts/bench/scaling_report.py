"""The tables and the picture of docs/scaling.md, from the figures of `scaling.py`.

    TABLES["weak"](figures)                  # Markdown
    draw(figures, Path("docs/scaling.png"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from report_plots import picture, stack_bars
from report_tables import markdown

from rankup.grpo.run.plots import COLOURS, FAINT_INK, MARKERS, POINT, STRONG

Figures = dict[str, Any]
SHOWN_STRONG = {1, 8, 16, 32, 64, 128, 512}
SHOWN_WEAK = {1, 8, 64, 512}
SHOWN_BARS = {8, 64, 512}
TITLE = "A step on many devices: a model, not a measurement"
ASSUMED = "Llama-3.1-8B, rank 64, H100 in nodes of 8, InfiniBand; completions of 600 tokens in the median, 4,096 at most"
PHASES = {
    "rollout": ("sampling", COLOURS[0]),
    "rollout_wait": ("waiting for the slowest sampler", COLOURS[5]),
    "training": ("training", COLOURS[1]),
    "training_wait": ("waiting for the slowest trainer", COLOURS[4]),
    "network": ("network, at most {most:.2f} %", "black"),
}


def _size(count: float) -> str:
    """`1.34 GB`, `671 MB`, `102 kB`; 0 as 0."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _network(figures: Figures) -> str:
    names = [one["name"] for one in figures["network"][0]["networks"]]
    rows = []
    for row in figures["network"]:
        sizes = (_size(row[key]) for key in ("sent_by_device", "sent_by_node", "records_received"))
        times = (f"{_time(one['seconds'])}, {_percent(one['share'])}" for one in row["networks"])
        rows.append([str(row["rank"]), str(row["workers"]), *sizes, *times])
    return markdown(["rank", "devices", "a device sends", "leaves a node", "records received", *names], rows, left=1)


def _algorithms(figures: Figures) -> str:
    names = {"ring": "one ring", "nodes": "rings in nodes, rings between", "tree": "rings in nodes, trees between"}
    rows = []
    for network in range(2):  # those with nodes
        for row in (row for row in figures["network"] if row["rank"] == 64):
            one = row["networks"][network]
            rows.append([one["name"], str(row["workers"]), *(_time(one["all_reduce"][name]) for name in names)])
    return markdown(["network", "devices", *names.values()], rows, left=1)


def _phases(row: Figures) -> list[str]:
    return [f"{row[name]:.1f}" if name != "network" else f"{row[name]:.3f}" for name in PHASES] + [f"**{row['seconds']:.1f}**"]


PHASE_HEAD = ["sampling", "wait", "training", "wait", "network", "step"]


def _strong(figures: Figures) -> str:
    rows = []
    for steps in figures["strong"].values():
        for row in (row for row in steps if row["workers"] in SHOWN_STRONG):
            speedup = steps[0]["seconds"] / row["seconds"]
            efficiency = speedup / row["workers"]
            rows.append(
                [f"{row['completions']:,}", str(row["workers"]), *_phases(row), f"{speedup:.1f}", f"{efficiency:.2f}"]
            )
    return markdown(["completions", "devices", *PHASE_HEAD, "speed-up", "efficiency"], rows, left=1)


def _weak(figures: Figures) -> str:
    rows = [
        [str(row["workers"]), f"{row['completions']:,}", *_phases(row), f"{row['iterations']:,.0f}", f"{row['busy']:.2f}"]
        for row in figures["weak"]["64"]
        if row["workers"] in SHOWN_WEAK
    ]
    return markdown(["devices", "completions", *PHASE_HEAD, "longest completion", "efficiency"], rows, left=1)


def _settings(figures: Figures) -> str:
    rows = []
    for row in figures["settings"]:
        waits = row["rollout_wait"] + row["training_wait"]
        times = f"{waits:.1f}", f"{row['seconds']:.1f}", f"{row['busy']:.2f}"
        rows.append([row["name"], *times, _percent(row["ethernet_share"])])
    heads = ["512 devices", "waits", "step", "efficiency", "network's share, 100 Gbit/s Ethernet"]
    return markdown(heads, rows, left=1)


TABLES: dict[str, Callable[[Figures], str]] = {
    "network": _network,
    "algorithms": _algorithms,
    "strong": _strong,
    "weak": _weak,
    "settings": _settings,
}


# ------------------------------------------------------------------------------------------------------------ picture


def draw(figures: Figures, out: Path) -> None:
    """Efficiency by number of devices next to a step's seconds by phase, into one PNG of 1,800 x 900 pixels."""
    with picture(out, TITLE, ASSUMED, panels=2, width=9, ratios=[1, 1.15]) as (left, right):
        _efficiency(left, figures)
        _bars(right, figures)


def _efficiency(axes: Any, figures: Figures) -> None:
    lines = {"128 completions per device": [(row["workers"], row["busy"]) for row in figures["weak"]["64"]]}
    for steps in reversed(figures["strong"].values()):
        alone = steps[0]["seconds"]
        points = [(row["workers"], alone / row["seconds"] / row["workers"]) for row in steps]
        lines[f"{steps[0]['completions']:,} completions in all"] = points
    for (name, points), colour, marker in zip(lines.items(), (COLOURS[2], COLOURS[0], COLOURS[3]), MARKERS, strict=False):
        look = {"color": colour, "marker": marker, "markerfacecolor": "white", **STRONG, **POINT}
        axes.plot(*zip(*points, strict=True), label=name, **look)
    ticks = [row["workers"] for row in figures["weak"]["64"]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=9)
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.08)
    axes.grid(axis="y")
    axes.set_xlabel("devices")
    axes.set_title("efficiency", loc="left", fontsize=11, color=FAINT_INK)
    axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", fontsize=9)


def _bars(axes: Any, figures: Figures) -> None:
    kinds = {"128 per device": figures["weak"]["64"], "8,192 in all": figures["strong"]["1024"]}
    shown = [(name, row) for name, rows in kinds.items() for row in rows if row["workers"] in SHOWN_BARS]
    bars = [(f"{name}\n{row['workers']} devices", row) for name, row in shown]
    most = max(row["network"] / row["seconds"] for _, row in bars)  # too little to be visible
    names = [label.format(most=100 * most) for label, _ in PHASES.values()]
    parts = [[row[phase] for _, row in bars] for phase in PHASES]
    ends = stack_bars(axes, names, parts, [colour for _, colour in PHASES.values()])
    for place, seconds in enumerate(ends):
        axes.annotate(f"{seconds:.0f} s", (seconds, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.16)
    axes.grid(axis="x")
    axes.set_xlabel("seconds")
    axes.set_title("where a step's time goes", loc="left", fontsize=11, color=FAINT_INK)
    axes.legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=9)
