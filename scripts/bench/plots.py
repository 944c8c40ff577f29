"""What the pictures of the pages share: a frame with title and note, and horizontal bars.

    with picture(Path("scaling.png"), "A title", "the assumptions", panels=2) as (left, right): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rankup.grpo.run.plots import COLOURS, FAINT_INK, STYLE

OURS, THEIRS = COLOURS[0], "#afb8c1"
PARTS = (*COLOURS, THEIRS, FAINT_INK)
BAR_HEIGHT = 0.62
SUBTITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "color": FAINT_INK}
LEGEND: dict[str, Any] = {"framealpha": 0.9, "edgecolor": "none", "fontsize": 9}


@contextmanager
def picture(
    out: Path,
    title: str,
    note: str,
    *,
    panels: int = 1,
    size: tuple[float, float] = (8, 4.5),
    mosaic: Sequence[Sequence[int]] | None = None,
) -> Iterator[list[Any]]:
    """Axes side by side, to draw on; then the picture is written.

    Args:
        out: the PNG file.
        title: above the axes.
        note: below them, in small print.
        panels: how many axes.
        size: width and height, 200 pixels each.
        mosaic: rows of a grid, which say for each place the axes that cover it, by number.
    """
    with rc_context(STYLE):
        drawn = Figure(figsize=size, dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))  # no pyplot: no display
        axes = drawn.subplot_mosaic([list(row) for row in mosaic or [range(panels)]])
        yield [axes[number] for number in sorted(axes)]
        for one in axes.values():
            one.set_axisbelow(True)
            one.tick_params(length=0)
        drawn.suptitle(title, x=0.02, ha="left", fontsize=14, fontweight="bold")
        drawn.supxlabel(note, x=0.02, ha="left", fontsize=9, color=FAINT_INK)
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(out)
    print(f"drawn: {out}")


def measured(out: Path, title: str, figure: dict[str, Any], *, panels: int = 1) -> AbstractContextManager[list[Any]]:
    """A picture with the machine of a result in its note."""
    cpu = figure["machine"]
    note = f"{cpu['cores']} cores of {cpu['cpu']}, SmolLM2-135M-Instruct, adapters on all linear layers"
    return picture(out, title, note, panels=panels)


def bars(axes: Any, labels: Sequence[str], values: Sequence[dict[str, Any]], texts: Sequence[str], **style: Any) -> None:
    """Horizontal bars of medians from the top down, a thin line from minimum to maximum, and a text to the right of each."""
    axes.barh(range(len(values)), [one["median"] for one in values], height=BAR_HEIGHT, **style)
    for row, (one, text) in enumerate(zip(values, texts, strict=True)):
        axes.plot([one["min"], one["max"]], [row, row], color=FAINT_INK, linewidth=1.4)
        axes.annotate(text, (one["max"], row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(one["max"] for one in values) * 1.6)  # room for the texts
    axes.grid(axis="x")


def stack(axes: Any, parts: Mapping[str, Sequence[float]], colours: Sequence[str] = PARTS) -> list[float]:
    """Draw horizontal bars part by part from the left; returns their ends. `parts`: by name, one value per bar."""
    ends = [0.0] * len(next(iter(parts.values())))
    for (name, values), colour in zip(parts.items(), colours, strict=False):
        axes.barh(range(len(values)), values, left=ends, height=BAR_HEIGHT, color=colour, label=name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    return ends


def legend_below(axes: Any) -> None:
    """The legend of a stack, under the axes."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, frameon=False, fontsize=9)
