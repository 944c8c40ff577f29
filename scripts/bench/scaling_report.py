"""The tables and the picture of docs/scaling.md, from the figures of `scaling.py`.

    tables(figures)["weak"]                  # Markdown
    draw(figures, Path("docs/scaling.png"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import markdown
from plots import LEGEND, SUBTITLE, picture, stack

from rankup.grpo.run.plots import COLOURS, MARKERS, POINT, STRONG

Figures = dict[str, Any]
SHOWN_STRONG = {1, 8, 16, 32, 64, 128, 512}
SHOWN_WEAK = {1, 8, 64, 512}
SHOWN_BARS = {8, 64, 512}
TITLE = "A step on many devices: a model, not a measurement"
ASSUMED = "Llama-3.1-8B, rank 64, H100 in nodes of 8, InfiniBand; completions of 600 tokens in the median, 4,096 at most"
ALGORITHMS = {"ring": "one ring", "nodes": "rings in nodes, rings between", "tree": "rings in nodes, trees between"}
PHASES = {
    "rollout": ("sampling", COLOURS[0]),
    "rollout_wait": ("waiting for the slowest sampler", COLOURS[5]),
    "training": ("training", COLOURS[1]),
    "training_wait": ("waiting for the slowest trainer", COLOURS[4]),
    "network": ("network, at most {most:.2f} %", "black"),
}
PHASE_HEADS = ["sampling", "wait", "training", "wait", "network", "step"]


# -------------------------------------------------------------------------------------------------------------- tables


def tables(figures: Figures) -> dict[str, str]:
    """Those of the page, by name."""
    return {
        "network": _network(figures),
        "algorithms": _algorithms(figures),
        "strong": _strong(figures),
        "weak": _weak(figures),
        "settings": _settings(figures),
    }


def _network(figures: Figures) -> str:
    rows = []
    for row in figures["network"]:
        sizes = (_size(row[key]) for key in ("sent_by_device", "sent_by_node", "records_received"))
        times = (f"{_time(one['seconds'])}, {_percent(one['share'])}" for one in row["networks"])
        rows.append([str(row["rank"]), str(row["workers"]), *sizes, *times])
    names = [one["name"] for one in figures["network"][0]["networks"]]
    return markdown(["rank", "devices", "a device sends", "leaves a node", "records received", *names], rows, left=1)


def _algorithms(figures: Figures) -> str:
    rows = []
    for network in range(2):  # those with nodes
        for row in (row for row in figures["network"] if row["rank"] == 64):
            one = row["networks"][network]
            rows.append([one["name"], str(row["workers"]), *(_time(one["all_reduce"][name]) for name in ALGORITHMS)])
    return markdown(["network", "devices", *ALGORITHMS.values()], rows, left=1)


def _strong(figures: Figures) -> str:
    rows = []
    for steps in figures["strong"].values():
        for row in (row for row in steps if row["workers"] in SHOWN_STRONG):
            speedup = steps[0]["seconds"] / row["seconds"]
            scaled = [f"{speedup:.1f}", f"{speedup / row['workers']:.2f}"]
            rows.append([f"{row['completions']:,}", str(row["workers"]), *_phases(row), *scaled])
    return markdown(["completions", "devices", *PHASE_HEADS, "speed-up", "efficiency"], rows, left=1)


def _weak(figures: Figures) -> str:
    rows = [
        [str(row["workers"]), f"{row['completions']:,}", *_phases(row), f"{row['iterations']:,.0f}", f"{row['busy']:.2f}"]
        for row in figures["weak"]["64"]
        if row["workers"] in SHOWN_WEAK
    ]
    return markdown(["devices", "completions", *PHASE_HEADS, "longest completion", "efficiency"], rows, left=1)


def _settings(figures: Figures) -> str:
    rows = []
    for row in figures["settings"]:
        waits = row["rollout_wait"] + row["training_wait"]
        times = f"{waits:.1f}", f"{row['seconds']:.1f}", f"{row['busy']:.2f}"
        rows.append([row["name"], *times, _percent(row["ethernet_share"])])
    heads = ["512 devices", "waits", "step", "efficiency", "network's share, 100 Gbit/s Ethernet"]
    return markdown(heads, rows, left=1)


def _phases(row: Figures) -> list[str]:
    return [*(f"{row[name]:.3f}" if name == "network" else f"{row[name]:.1f}" for name in PHASES), f"**{row['seconds']:.1f}**"]


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


# ------------------------------------------------------------------------------------------------------------- picture


def draw(figures: Figures, out: Path) -> None:
    """Efficiency by number of devices next to a step's seconds by phase, into one PNG of 1,800 x 900 pixels."""
    with picture(out, TITLE, ASSUMED, mosaic=[[0] * 6 + [1] * 7], size=(9, 4.5)) as (left, right):
        _draw_efficiency(left, figures)
        _draw_phases(right, figures)


def _draw_efficiency(axes: Any, figures: Figures) -> None:
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
    axes.set_title("efficiency", **SUBTITLE)
    axes.legend(loc="upper right", **LEGEND)


def _draw_phases(axes: Any, figures: Figures) -> None:
    kinds = {"128 per device": figures["weak"]["64"], "8,192 in all": figures["strong"]["1024"]}
    shown = [(name, row) for name, rows in kinds.items() for row in rows if row["workers"] in SHOWN_BARS]
    most = max(row["network"] / row["seconds"] for _, row in shown)  # too little to be visible
    parts = {label.format(most=100 * most): [row[phase] for _, row in shown] for phase, (label, _) in PHASES.items()}
    ends = stack(axes, parts, [colour for _, colour in PHASES.values()])
    for place, seconds in enumerate(ends):
        axes.annotate(f"{seconds:.0f} s", (seconds, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [f"{name}\n{row['workers']} devices" for name, row in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.16)
    axes.grid(axis="x")
    axes.set_xlabel("seconds")
    axes.set_title("where a step's time goes", **SUBTITLE)
    axes.legend(loc="lower right", **LEGEND)
