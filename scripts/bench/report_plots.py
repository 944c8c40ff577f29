"""The pictures of `report.py`, one for each benchmark's result, in the style of the learning curve (`grpo/plots.py`).

PLOTS["rank"](json.loads(text), Path("rank.png"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Picture
from matplotlib.layout_engine import ConstrainedLayoutEngine
from report_tables import PHASES, SIDES, Figure, three, trl_sides

from rankup.grpo.run.plots import COLOURS, FAINT_INK, STRONG, STYLE

OURS, THEIRS = COLOURS[0], "#afb8c1"
PARTS = (*COLOURS, THEIRS, FAINT_INK)
BAR_HEIGHT = 0.62


@contextmanager
def _picture(out: Path, title: str, figure: Figure, *, panels: int = 1) -> Iterator[list[Any]]:
    """Axes of a picture of 1,600 x 900 pixels, which is written once they are drawn on."""
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        picture = Picture(figsize=(8, 4.5), dpi=200, layout=layout)  # no pyplot: no global state, no display
        axes = picture.subplots(1, panels, squeeze=False)[0].tolist()
        yield axes
        for one in axes:
            one.set_axisbelow(True)
            one.tick_params(length=0)
        picture.suptitle(title, x=0.02, ha="left", fontsize=14, fontweight="bold")
        cpu = figure["machine"]
        where = f"{cpu['cores']} cores of {cpu['cpu']}, SmolLM2-135M-Instruct, adapters on all linear layers"
        picture.supxlabel(where, x=0.02, ha="left", fontsize=9, color=FAINT_INK)
        picture.savefig(out)


def _bars(axes: Any, labels: Sequence[str], summaries: Sequence[Figure], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Horizontal bars of medians from the top down, a thin line from least to most, and a text behind each."""
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
    """Seconds of the training phase by side, a panel a case; memory in the texts."""
    cases = figure["cases"]
    with _picture(out, "Training phase of a step: time, and memory above the loaded model", figure, panels=len(cases)) as axes:
        for index, (panel, (name, case)) in enumerate(zip(axes, cases.items(), strict=True)):
            seconds = case["seconds"]
            speedups = [case["speedup"] if side == "stock" else case.get(f"speedup_over_{side}") for side in seconds]
            texts = [
                f"{_with_ratio(one, speedup, ', ')}\n{case['peak_bytes'][side] / 2**30:.1f} GiB"
                for (side, one), speedup in zip(seconds.items(), speedups, strict=True)
            ]
            labels = [str(SIDES["train_step"].get(side, side)) if index == 0 else "" for side in seconds]
            colours = [OURS if side == "rankup" else THEIRS for side in seconds]
            _bars(panel, labels, list(seconds.values()), texts, colours)
            prompt, completion = name.split("+")
            panel.set_title(f"prompts of {prompt}, completions of {completion}", loc="left", fontsize=10, color=FAINT_INK)
            panel.set_xlabel("seconds")


def rank(figure: Figure, out: Path) -> None:
    """Time and operations by rank, relative to the smallest one, a panel a case."""
    cases = figure["cases"]
    with _picture(out, "A step's time beside its operations, as the rank grows", figure, panels=len(cases)) as axes:
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
    """Seconds of a whole step by side, in its phases where they are given."""
    sides = trl_sides(figure)
    summaries = [seconds for seconds, _ in sides.values()]
    texts = [_with_ratio(seconds, speedup, "\n") for seconds, speedup in sides.values()]
    phases = {name: figure.get("phases", {}).get(name, {}) for name in sides}
    with _picture(out, "A whole step of GRPO", figure) as (axes,):
        labels = [SIDES["vs_trl"].get(name, name) for name in sides]
        shown = [phase for phase in PHASES if any(phase in parts for parts in phases.values())]
        colours = ["none" if shown else OURS if name == "rankup" else THEIRS for name in sides]
        _bars(axes, labels, summaries, texts, colours)
        parts = [[phases[name].get(phase, {"median": 0.0})["median"] for name in sides] for phase in shown]
        _stack(axes, [PHASES[phase] for phase in shown], parts)
        axes.set_xlabel("seconds")


def rollout(figure: Figure, out: Path) -> None:
    """Tokens per second by engine: whole rollouts, and decoding alone."""
    panels = {"rollouts of the quick start": figure["tokens_per_second"], "decoding alone": figure["decoding"]}
    with _picture(out, "Sampling with a rank-64 adapter", figure, panels=len(panels)) as axes:
        for index, (panel, (title, rates)) in enumerate(zip(axes, panels.items(), strict=True)):
            summaries = [rates[name] for name in SIDES["rollout"]]
            labels = [label.replace(", ", ",\n") if index == 0 else "" for label in SIDES["rollout"].values()]
            _bars(panel, labels, summaries, [three(one["median"]) for one in summaries], [OURS, THEIRS, THEIRS])
            panel.set_xlabel("tokens per second")
            panel.set_title(title, loc="left", fontsize=11, color=FAINT_INK)


def profile(figure: Figure, out: Path) -> None:
    """Where a step's time goes, a bar a case, and the floor of its products as a line across it."""
    cases = figure["cases"]
    steps = [case["step_seconds"] for case in cases.values()]
    with _picture(out, "Where the time of a training step goes", figure) as (axes,):
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
    """The parts of each bar from the left, and the legend below the axes."""
    if not names:
        return
    left = [0.0] * len(parts[0])
    for name, values, colour in zip(names, parts, PARTS, strict=False):
        axes.barh(range(len(values)), values, left=left, height=BAR_HEIGHT, color=colour, label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, frameon=False, fontsize=9)


PLOTS: dict[str, Callable[[Figure, Path], None]] = {
    "train_step": train_step,
    "rank": rank,
    "vs_trl": vs_trl,
    "rollout": rollout,
    "profile": profile,
}
