"""The results of the study as Markdown tables and as a picture. Rows are those of `ranks.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common import markdown

Row = dict[str, Any]

COLOURS = {"alpha 32": "#0072B2", "alpha r": "#009E73", "alpha 2r": "#E69F00", "rslora 32": "#D55E00"}
MARKERS = {64: "o", 128: "D"}
STEP_TICKS = (0.3, 0.6, 1, 2, 4, 8, 16, 32)
SEED_MARKERS = {1: "o", 2: "s"}
GUARDED, UNGUARDED = "#0072B2", "#D55E00"


def tables(rows: Sequence[Row]) -> str:
    """A table for each experiment that has results."""
    parts = [_grid_table(rows), *(_run_table(rows, name) for name in ("collapse", "ramp", "defaults"))]
    return "\n\n".join(part for part in parts if part)


def _grid_table(rows: Sequence[Row]) -> str:
    """Last evaluation by rank and scaling (rows) and learning rate (columns), all seeds in a cell."""
    cells: defaultdict[tuple[int, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row["experiment"] == "grid":
            cells[row["rank"], row["scaling"], row["learning_rate"]].append(row)
    if not cells:
        return ""
    rates = sorted({rate for _, _, rate in cells})
    lines = [
        [str(rank), scaling, *(_cell(cells.get((rank, scaling, rate), [])) for rate in rates)]
        for rank, scaling in dict.fromkeys((rank, scaling) for rank, scaling, _ in cells)
    ]
    return markdown(["rank", "scaling", *(f"{rate:g}" for rate in rates)], lines, left=2 + len(rates))


def _cell(rows: Sequence[Row]) -> str:
    """The last evaluation of each seed, or that it collapsed, and the step factor."""
    if not rows:
        return ""
    results = ["collapsed" if row["stopped"] else f"{row['last_evaluation']:.2f}" for row in rows]
    return f"{', '.join(results)} ({rows[0]['step_factor']:.3g}x)"


def _run_table(rows: Sequence[Row], experiment: str) -> str:
    """A row per run."""
    lines = []
    for row in sorted(rows, key=lambda r: (r["rank"], r["guards"], r["seed"])):
        if row["experiment"] != experiment:
            continue
        best, last = row["best_evaluation"], row["last_evaluation"]
        run = [str(row["rank"]), row["scaling"], f"{row['learning_rate']:g}", str(row["seed"])]
        share = last / best if best else 0.0
        results = [f"{best:.3f}", f"{last:.3f}", f"{share:.2f}", _actions(row)]
        lines.append([*run, "on" if row["guards"] else "off", str(row["steps"]), *results])
    heads = ["rank", "scaling", "rate", "seed", "guards", "steps", "best evaluation", "last", "last / best", "guard actions"]
    return markdown(heads, lines, left=len(heads)) if lines else ""


def _actions(row: Row) -> str:
    names = ("alarms", "skipped_steps", "halvings", "restores")
    counts = [(name.replace("_", " "), int(row["guard_actions"].get(f"guards/{name}", 0))) for name in names]
    return ", ".join(f"{count} {name}" for name, count in counts if count) or "nothing"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Left: last evaluation of the grid by effective step. Right: evaluations of the runs with a rising rate."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from rankup.grpo.run.plots import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(12.8, 5.4), dpi=125, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        _draw_grid(left, [row for row in rows if row["experiment"] == "grid"])
        _draw_collapse(right, [row for row in rows if row["experiment"] == "ramp"])
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)


def _draw_grid(axes: Any, rows: Sequence[Row]) -> None:
    found = {(row["scaling"], row["rank"]) for row in rows}
    for scaling, rank in (pair for pair in product(COLOURS, MARKERS) if pair in found):
        points = [row for row in rows if (row["scaling"], row["rank"]) == (scaling, rank)]
        complete = [row for row in points if not row["stopped"]]
        style = {"color": COLOURS[scaling], "marker": MARKERS[rank], "markersize": 8, "linestyle": "none"}
        label = f"{scaling.replace('rslora', 'rsLoRA, alpha')}, rank {rank}"
        axes.plot([r["step_factor"] for r in complete], [r["last_evaluation"] for r in complete], label=label, **style)
        collapsed = [row for row in points if row["stopped"]]
        axes.plot([r["step_factor"] for r in collapsed], [0.0] * len(collapsed), markerfacecolor="none", **style)
    axes.set_xscale("log")
    axes.set_xticks(STEP_TICKS, [f"{tick:g}" for tick in STEP_TICKS], minor=False)
    axes.minorticks_off()
    axes.set_ylim(-0.04, 1.0)
    axes.set_xlabel("effective step, times the reference (alpha 32, rate 1e-4)")
    axes.set_title("Greedy accuracy after 40 short steps (hollow, at 0: collapsed)", loc="left", fontsize=11)
    axes.grid(axis="y")
    if rows:
        axes.legend(fontsize=9, frameon=False, ncols=2)


def _draw_collapse(axes: Any, rows: Sequence[Row]) -> None:
    for row in sorted(rows, key=lambda row: (row["guards"], row["seed"])):
        colour, guards = (GUARDED, "with guards") if row["guards"] else (UNGUARDED, "without guards")
        style = {"color": colour, "marker": SEED_MARKERS[row["seed"]], "markersize": 6, "linewidth": 2}
        axes.plot(*zip(*row["evaluations"], strict=True), label=f"{guards}, seed {row['seed']}", **style)
    axes.set_ylim(-0.04, 1.0)
    axes.set_xlabel("step")
    axes.set_title("Greedy accuracy at rank 128, alpha 256, under a rate that rises to 1e-3", loc="left", fontsize=11)
    axes.grid(axis="y")
    if rows:
        axes.legend(frameon=False)
