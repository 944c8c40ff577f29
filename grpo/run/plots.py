"""The learning curve of one or several runs as a PNG.

    plot_learning_curve([Path("runs/quickstart")], Path("runs/quickstart/learning_curve.png"))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from .records import CONFIG_FILE, read_metrics

# Okabe and Ito's colours, which can be distinguished in print and with all common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
INK = "#24292f"
FAINT_INK = "#6e7781"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#d0d7de",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
    "grid.color": "#eaeef2",
    "grid.linewidth": 1.0,
}

THIN: dict[str, Any] = {"alpha": 0.3, "linewidth": 1.1}
STRONG: dict[str, Any] = {"linewidth": 2.4, "solid_capstyle": "round"}
POINT: dict[str, Any] = {"markersize": 8, "markeredgewidth": 1.9}


@dataclass(frozen=True)
class Curve:
    """The data of one run. Points are (step, reward); NaN for a step without a reward, where the line has a gap."""

    name: str
    seed: int | None
    setting: list[str]
    rewards: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]

    @property
    def known(self) -> list[tuple[int, float]]:
        """The steps with a reward."""
        return [(step, reward) for step, reward in self.rewards if math.isfinite(reward)]


def plot_learning_curve(run_dirs: Sequence[Path], out: Path, *, title: str | None = None) -> None:
    """Draw the rewards of the runs into one PNG of 1,600 x 900 pixels.

    Thin line: mean reward of each step. Strong line: its running mean over a tenth of the run. Markers: evaluations. Both lines
    have gaps where no reward is known. The default title is the name of the run.

    Raises:
        ValueError: a folder is not a run folder, or no step of it has a reward.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    curves = [_read_curve(Path(run_dir)) for run_dir in run_dirs]
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(8, 4.5), dpi=200, layout=layout)  # no pyplot: no global state, no display
        axes = figure.add_subplot()
        for curve, colour, marker in zip(curves, cycle(COLOURS), cycle(MARKERS)):
            face = "white" if len(curves) == 1 else "none"  # markers of several runs may overlap
            _draw(axes, curve, colour=colour, marker=marker, face=face)
        if len(curves) == 1:
            _write_values(axes, curves[0])
        if all(0 <= reward <= 1 for curve in curves for _, reward in curve.known + curve.evaluations):
            axes.set_ylim(-0.03, 1.03)
        axes.margins(x=0.04)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("mean reward")
        names = dict.fromkeys(curve.name for curve in curves)
        axes.set_title(title or ", ".join(names), loc="left", fontsize=14, fontweight="bold", pad=26)
        axes.annotate(
            _subtitle(curves),
            (0, 1),
            xytext=(0, 9),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=10,
            color=FAINT_INK,
        )
        rising = curves[0].known[-1][1] >= curves[0].known[0][1]
        corner = "lower right" if rising else "upper right"
        axes.legend(handles=_legend(curves), loc=corner, framealpha=0.9, edgecolor="none", fontsize=10)
        figure.savefig(out)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, at most `window` values; as long as `values`. NaN where the value is NaN."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    known = [[value for value in part if math.isfinite(value)] for part in parts]
    return [sum(part) / len(part) if math.isfinite(value) else math.nan for part, value in zip(known, values, strict=True)]


def _read_curve(run_dir: Path) -> Curve:
    rows = read_metrics(run_dir)
    rewards = [(row["step"], math.nan if row["reward"] is None else row["reward"]) for row in rows if "reward" in row]
    evaluations = [(row["step"], row["eval_reward"]) for row in rows if row.get("eval_reward") is not None]
    if all(math.isnan(reward) for _, reward in rewards):
        raise ValueError(f"{run_dir} has no step with a reward yet, so there is no curve to draw")
    config = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8")) or {}
    return Curve(
        name=_get(config, "logging", "run_name") or run_dir.name,
        seed=_get(config, "seed"),
        setting=_setting(config),
        rewards=rewards,
        evaluations=evaluations,
    )


def _subtitle(curves: Sequence[Curve]) -> str:
    """The settings that all runs share."""
    shared = [part for part in curves[0].setting if all(part in curve.setting for curve in curves)]
    return ", ".join(shared)


def _setting(config: Any) -> list[str]:
    """Model, rank and batch, without those that the configuration lacks."""
    parts = []
    if model := _get(config, "model", "name"):
        parts.append(Path(str(model)).name)
    if rank := _get(config, "lora", "rank"):
        parts.append(f"LoRA rank {rank}")
    prompts, completions = _get(config, "optim", "prompts_per_step"), _get(config, "rollout", "num_generations")
    if prompts and completions:
        parts.append(f"{prompts} prompts x {completions} completions per step")
    return parts


def _get(config: Any, *keys: str) -> Any:
    """The value under a path of keys; None if a part of the path is missing."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _draw(axes: Any, curve: Curve, *, colour: str, marker: str, face: str) -> None:
    steps = [step for step, _ in curve.rewards]
    rewards = [reward for _, reward in curve.rewards]
    axes.plot(steps, rewards, color=colour, **THIN)
    axes.plot(steps, running_mean(rewards, _window(curve)), color=colour, **STRONG)
    if curve.evaluations:
        points = zip(*curve.evaluations, strict=True)
        axes.plot(*points, color=colour, marker=marker, markerfacecolor=face, linestyle="none", zorder=4, **POINT)


def _legend(curves: Sequence[Curve]) -> list[Any]:
    """One run: the kinds of lines. Several runs: their colours, then the kinds of lines in grey."""
    from matplotlib.lines import Line2D

    handles = []
    kinds_colour = COLOURS[0]
    if len(curves) > 1:
        one_name = len({curve.name for curve in curves}) == 1
        for curve, colour, marker in zip(curves, cycle(COLOURS), cycle(MARKERS)):
            seed = "" if curve.seed is None else f"seed {curve.seed}"
            label = seed if one_name and seed else f"{curve.name} {seed}"
            handles.append(
                Line2D([], [], color=colour, marker=marker, label=label, markerfacecolor="white", **STRONG, **POINT)
            )
        kinds_colour = FAINT_INK
    handles.append(Line2D([], [], color=kinds_colour, label="each step", **THIN))
    if (window := _window(curves[0])) > 1:
        handles.append(Line2D([], [], color=kinds_colour, label=f"mean of {window} steps", **STRONG))
    if any(curve.evaluations for curve in curves):
        look = {"color": kinds_colour, "marker": "o", "markerfacecolor": "white", "linestyle": "none", **POINT}
        handles.append(Line2D([], [], label="evaluation", **look))
    return handles


def _window(curve: Curve) -> int:
    return max(1, len(curve.rewards) // 10)


def _write_values(axes: Any, curve: Curve) -> None:
    """The first and the last evaluation as numbers next to their markers."""
    ends = dict.fromkeys(curve.evaluations[:1] + curve.evaluations[-1:])
    for step, reward in ends:
        text = axes.annotate(f"{reward:.2f}", (step, reward), xytext=(0, 9), textcoords="offset points", ha="center")
        text.set(fontweight="bold", zorder=3, bbox={"color": "white", "alpha": 0.75, "pad": 1, "linewidth": 0})
