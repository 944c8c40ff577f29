"""The pictures of `report.py`, one for each benchmark's result, and what other pictures share with them.

    PLOTS["rank"](json.loads(text), Path("rank.png"))
    with picture(Path("scaling.png"), "A title", "the assumptions", panels=2) as (left, right): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Picture
from matplotlib.layout_engine import ConstrainedLayoutEngine
from report_tables import PHASES, SIDES, Figure, rate_text, train_step_speedup, trl_sides

from rankup.grpo.run.plots import COLOURS, FAINT_INK, STRONG, STYLE

OURS, THEIRS = COLOURS[0], "#afb8c1"
PARTS = (*COLOURS, THEIRS, FAINT_INK)
BAR_HEIGHT = 0.62


@contextmanager
def picture(
    out: Path, title: str, note: str, *, panels: int = 1, width: float = 8, ratios: Sequence[float] | None = None
) -> Iterator[list[Any]]:
    """Axes side by side, to draw on; then the picture is written.

    Args:
        out: the PNG file.
        title: above the axes.
        note: below them, in small print.
        panels: how many axes.
        width: 200 pixels each. The height is 900 pixels.
        ratios: relative widths of the axes.
    """
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        drawn = Picture(figsize=(width, 4.5), dpi=200, layout=layout)  # no pyplot: no global state, no display
        axes = drawn.subplots(1, panels, squeeze=False, width_ratios=ratios)[0].tolist()
        yield axes
        for one in axes:
            one.set_axisbelow(True)
            one.tick_params(length=0)
        drawn.suptitle(title, x=0.02, ha="left", fontsize=14, fontweight="bold")
        drawn.supxlabel(note, x=0.02, ha="left", fontsize=9, color=FAINT_INK)
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(out)


def _measured(out: Path, title: str, figure: Figure, *, panels: int = 1) -> AbstractContextManager[list[Any]]:
    """A picture with the machine in its note."""
    cpu = figure["machine"]
    note = f"{cpu['cores']} cores of {cpu['cpu']}, SmolLM2-135M-Instruct, adapters on all linear layers"
    return picture(out, title, note, panels=panels)


def _bars(axes: Any, labels: Sequence[str], summaries: Sequence[Figure], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Horizontal bars of medians from the top down, a thin line from minimum to maximum, and a text to the right of each."""
    axes.barh(range(len(summaries)), [one["median"] for one in summaries], height=BAR_HEIGHT, color=colours)
    for row, (one, text) in enumerate(zip(summaries, texts, strict=True)):
        axes.plot([one["min"], one["max"]], [row, row], color=FAINT_INK, linewidth=1.4)
        axes.annotate(text, (one["max"], row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(one["max"] for one in summaries) * 1.6)  # room for the texts
    axes.grid(axis="x")


def _with_ratio(seconds: Figure, speedup: float | None, separator: str) -> str:
    text = f"{seconds['median']:.2f} s"
    return text if speedup is None else f"{text}{separator}{speedup:.1f} × rankup's"


def train_step(figure: Figure, out: Path) -> None:
    """Seconds of the training phase by side, a panel per case; memory in the texts."""
    cases = figure["cases"]
    with _measured(out, "Training phase of a step: time, and memory above the loaded model", figure, panels=len(cases)) as axes:
        for index, (panel, (name, case)) in enumerate(zip(axes, cases.items(), strict=True)):
            seconds = case["seconds"]
            texts = [
                f"{_with_ratio(one, train_step_speedup(case, side), ', ')}\n{case['peak_bytes'][side] / 2**30:.1f} GiB"
                for side, one in seconds.items()
            ]
            labels = [str(SIDES["train_step"].get(side, side)) if index == 0 else "" for side in seconds]
            colours = [OURS if side == "rankup" else THEIRS for side in seconds]
            _bars(panel, labels, list(seconds.values()), texts, colours)
            prompt, completion = name.split("+")
            panel.set_title(f"prompts of {prompt}, completions of {completion}", loc="left", fontsize=10, color=FAINT_INK)
            panel.set_xlabel("seconds")


def rank(figure: Figure, out: Path) -> None:
    """Time and operations by rank, relative to the smallest one, a panel per case."""
    cases = figure["cases"]
    with _measured(out, "Time and operations of a step, as the rank grows", figure, panels=len(cases)) as axes:
        for panel, (name, case) in zip(axes, cases.items(), strict=True):
            ranks = [int(value) for value in case["ranks"]]
            times = [one["seconds"] for one in case["ranks"].values()]
            operations = [one["operations"]["total"] for one in case["ranks"].values()]
            first = times[0]["median"]
            panel.plot(ranks, [count / operations[0] for count in operations], color=COLOURS[1], label="operations", **STRONG)
            medians = [one["median"] / first for one in times]
            panel.fill_between(
                ranks, [one["min"] / first for one in times], [one["max"] / first for one in times], color=OURS, alpha=0.15
            )
            panel.plot(ranks, medians, color=OURS, marker="o", markerfacecolor="white", label="time", **STRONG)
            panel.set_xticks(ranks)
            panel.set_ylim(bottom=0)
            panel.grid(axis="y")
            panel.set_xlabel("rank")
            panel.set_ylabel(f"relative to rank {ranks[0]}")
            panel.set_title(f"{name}, {case['tokens']:,} tokens", loc="left", fontsize=11, color=FAINT_INK)
            panel.legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=10)


def vs_trl(figure: Figure, out: Path) -> None:
    """Seconds of a complete step by side, divided into phases if the result has any."""
    sides = trl_sides(figure)
    summaries = [seconds for seconds, _ in sides.values()]
    texts = [_with_ratio(seconds, speedup, "\n") for seconds, speedup in sides.values()]
    phases = {name: figure.get("phases", {}).get(name, {}) for name in sides}
    with _measured(out, "A complete step of GRPO", figure) as (axes,):
        labels = [SIDES["vs_trl"].get(name, name) for name in sides]
        shown = [phase for phase in PHASES if any(phase in parts for parts in phases.values())]
        colours = ["none" if shown else OURS if name == "rankup" else THEIRS for name in sides]
        _bars(axes, labels, summaries, texts, colours)
        parts = [[phases[name].get(phase, {"median": 0.0})["median"] for name in sides] for phase in shown]
        _stack(axes, [PHASES[phase] for phase in shown], parts)
        axes.set_xlabel("seconds")


def rollout(figure: Figure, out: Path) -> None:
    """Tokens per second by engine: full rollouts, and decoding alone."""
    panels = {"rollouts of the quick start": figure["tokens_per_second"], "decoding alone": figure["decoding"]}
    with _measured(out, "Sampling with a rank-64 adapter", figure, panels=len(panels)) as axes:
        for index, (panel, (title, rates)) in enumerate(zip(axes, panels.items(), strict=True)):
            summaries = [rates[name] for name in SIDES["rollout"]]
            labels = [label.replace(", ", ",\n") if index == 0 else "" for label in SIDES["rollout"].values()]
            _bars(panel, labels, summaries, [rate_text(one["median"]) for one in summaries], [OURS, THEIRS, THEIRS])
            panel.set_xlabel("tokens per second")
            panel.set_title(title, loc="left", fontsize=11, color=FAINT_INK)


def profile(figure: Figure, out: Path) -> None:
    """Where the time of a step goes, a bar per case, and the floor of its products as a line across it."""
    cases = figure["cases"]
    steps = [case["step_seconds"] for case in cases.values()]
    with _measured(out, "Where the time of a training step goes", figure) as (axes,):
        _bars(axes, list(cases), steps, [f"{step['median']:.2f} s" for step in steps], ["none"] * len(steps))
        buckets = list(next(iter(cases.values()))["seconds"])
        for row, case in enumerate(cases.values()):
            label = "floor: products at a bare one's rate" if row == 0 else None
            ends = [row - BAR_HEIGHT * 0.62, row + BAR_HEIGHT * 0.62]
            axes.plot([case["floor_seconds"]] * 2, ends, color="black", linestyle=(0, (4, 2)), linewidth=1.6, label=label)
        _stack(axes, buckets, [[case["seconds"][name] for case in cases.values()] for name in buckets])
        axes.set_xlim(0, max(step["max"] for step in steps) * 1.1)
        axes.set_xlabel("seconds")


def _stack(axes: Any, names: Sequence[str], parts: Sequence[Sequence[float]]) -> None:
    """Divide the bars into parts, with a legend below the axes."""
    if not names:
        return
    stack_bars(axes, names, parts, PARTS)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, frameon=False, fontsize=9)


def stack_bars(
    axes: Any, names: Sequence[str], parts: Sequence[Sequence[float]], colours: Sequence[str]
) -> list[float]:
    """Draw horizontal bars part by part from the left; returns their ends. `parts`: for each name, one value per bar."""
    ends = [0.0] * len(parts[0])
    for name, values, colour in zip(names, parts, colours, strict=False):
        axes.barh(range(len(values)), values, left=ends, height=BAR_HEIGHT, color=colour, label=name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    return ends


PLOTS: dict[str, Callable[[Figure, Path], None]] = {
    "train_step": train_step,
    "rank": rank,
    "vs_trl": vs_trl,
    "rollout": rollout,
    "profile": profile,
}
