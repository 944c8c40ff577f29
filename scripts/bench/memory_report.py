"""The tables and the picture of docs/memory.md, from the measured cells of `memory.py`.

    tables(cells)["vocabularies"]           # Markdown
    draw(cells, Path("docs/memory.png"))

The predictions of `rankup plan` are computed here, so that the page compares the current planner with the measured figures.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import markdown
from memory import PROMPT, SIDE_NAMES, Cell, config_of
from plots import LEGEND, SUBTITLE, picture
from scaling import shape_of

from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.parts import FP32, changed, training_parts
from rankup.grpo.memory.shapes import ModelShape
from rankup.grpo.run.plots import COLOURS, FAINT_INK, MARKERS

GIB = 2**30
NOT_SEEN = ("gaps", "runtime", "guards_snapshot")
"""Parts of the plan that no tensor is: the allocator's gaps, the context with its libraries, and a copy on the host."""
LABELS = {"rankup": "rankup", "trl": "PEFT, TRL's chunked head", "peft": "PEFT, full logits"}
NAMES = {"8B": "Llama-3.1-8B", "14B": "Qwen2.5-14B", "32B": "Qwen3-32B"}
DEVICES_GIB = (24, 80, 141)
ABOVE = "above weights, gradients and AdamW, GiB"


# ---------------------------------------------------------------------------------------------------------------- plan


@functools.cache
def _shape(model: str, vocabulary: int | None) -> ModelShape:
    return shape_of(config_of(model, vocabulary))


def planned(cell: Cell) -> int:
    """The prediction of `rankup plan` for the measured parts, in bytes. The base counts once: in a run it is vLLM's copy."""
    config = GRPOConfig(
        model={"share_base_weights": False},
        lora={"rank": cell.rank},
        rollout={
            "num_generations": cell.generations,
            "max_prompt_length": cell.prompt,
            "max_completion_length": cell.completion,
        },
        optim={"tokens_per_pack": cell.case.tokens, "gradient_checkpointing": cell.gradient_checkpointing},
    )
    config = changed(config, {"lora.max_rank": cell.rank})
    parts = training_parts(_shape(cell.model, cell.vocabulary), config, "cuda")
    return sum(size for name, size in parts.items() if name not in NOT_SEEN)


def activations(cell: Cell) -> int:
    """What an update takes at its peak beyond its state and the adapter's gradients, in bytes."""
    adapter = cell.rank * _shape(cell.model, cell.vocabulary).parameters_per_rank("all-linear")
    return cell.peak - cell.state - FP32 * adapter


# -------------------------------------------------------------------------------------------------------------- tables


def _select(cells: Sequence[Cell], part: str, **values: Any) -> list[Cell]:
    return [cell for cell in cells if cell.part == part and all(getattr(cell, name) == v for name, v in values.items())]


def tables(cells: Sequence[Cell]) -> dict[str, str]:
    """Those of the page, by name."""
    return {
        "checkpointing": _lengths(_select(cells, "lengths", rank=64, gradient_checkpointing=True)),
        "kept": _lengths(_select(cells, "lengths", rank=64, gradient_checkpointing=False)),
        "rank128": _lengths(_select(cells, "lengths", rank=128)),
        "vocabularies": _vocabularies(_select(cells, "vocabularies")),
        "completions": _completions(_select(cells, "completions")),
    }


def _by_side(cells: Sequence[Cell]) -> list[tuple[Cell, ...]]:
    """Cells of the same model and group next to each other, rankup's first."""
    order = [[cell for cell in cells if cell.side == name] for name in SIDE_NAMES]
    return list(zip(*filter(None, order), strict=True))


def _lengths(cells: Sequence[Cell]) -> str:
    rows = []
    for sides in _by_side(cells):
        ours = sides[0]
        sizes = [NAMES[ours.model], f"{ours.plain_tokens:,}", f"{ours.case.tokens:,}", *(_gib(cell.peak) for cell in sides)]
        rows.append([*sizes, f"{planned(ours) / ours.peak:.3f}"])
    heads = ["model", "tokens, plain", "tokens, prompt once", *LABELS.values(), "`rankup plan` / measured"]
    return markdown(heads, rows, left=1)


def _vocabularies(cells: Sequence[Cell]) -> str:
    rows = []
    for sides in _by_side(cells):
        vocabulary = sides[0].vocabulary or 0
        weights = 2 * 2 * vocabulary * _shape("8B", vocabulary).hidden
        rows.append([f"{vocabulary:,}", _gib(weights), *(_gib(activations(cell)) for cell in sides)])
    return markdown(["vocabulary", "its weights, head and embedding", *LABELS.values()], rows, left=0)


def _completions(cells: Sequence[Cell]) -> str:
    kept, again = (_by_side([c for c in cells if c.gradient_checkpointing is on]) for on in (False, True))
    rows = []
    for sides in zip(kept, again, strict=True):
        ours, tokens = sides[0][0], sides[0][0].case.tokens
        sizes = [f"{ours.completion:,}", str(ours.generations), f"{tokens:,}", f"{ours.plain_tokens:,}"]
        figures = [(activations(cell), tokens) for cell in itertools.chain(*sides)]
        rows.append([*sizes, *(f"{_gib(size)}, {size / tokens / 1024:,.0f}" for size, tokens in figures)])
    heads = [f"{LABELS[name]}{also}" for also in ("", ", checkpointing") for name in ("rankup", "trl")]
    return markdown(["R", "G", "P + G (R - 1)", "G (P + R)", *heads], rows, left=0)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= 10 * GIB else f"{size / GIB:.2f}"


# ------------------------------------------------------------------------------------------------------------- picture


def draw(cells: Sequence[Cell], out: Path) -> None:
    """Peaks by tokens for each model, then by vocabulary and by P + G R, into one PNG of 2,000 x 1,600 pixels."""
    title = "Memory of a training step, on fake tensors"
    note = "rank 64 on all linear layers, base in bf16 and held once; counted tensor by tensor, no GPU was involved"
    mosaic = [[0, 0, 1, 1, 2, 2], [3, 3, 3, 4, 4, 4]]
    with picture(out, title, note, size=(10, 8), mosaic=mosaic) as (*lengths, vocabularies, completions):
        for axes, model in zip(lengths, NAMES, strict=True):
            _draw_lengths(axes, _select(cells, "lengths", rank=64, model=model), NAMES[model])
        lengths[0].set_ylabel("peak of an update, GiB")
        _draw_device_sizes(lengths)
        _draw_legend(lengths[0])
        _draw_vocabularies(vocabularies, _select(cells, "vocabularies"))
        _draw_completions(completions, _select(cells, "completions", gradient_checkpointing=False))
        for axes in (*lengths, vocabularies, completions):
            axes.tick_params(labelsize=9)
            axes.grid(axis="y")


def _look(side: str) -> dict[str, Any]:
    index = SIDE_NAMES.index(side)
    return {"color": COLOURS[index], "marker": MARKERS[index], "markerfacecolor": "white", "linewidth": 2, "markersize": 6}


def _draw_lengths(axes: Any, cells: Sequence[Cell], title: str) -> None:
    for side, (checkpointing, style) in itertools.product(reversed(SIDE_NAMES), ((True, "-"), (False, ":"))):
        line = [c for c in cells if c.side == side and c.gradient_checkpointing is checkpointing]
        axes.plot([c.plain_tokens for c in line], [c.peak / GIB for c in line], linestyle=style, **_look(side))
    ticks = sorted({c.plain_tokens for c in cells})
    axes.set(xscale="log", yscale="log", ylim=(14, 2600))
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000], ["20", "50", "100", "200", "500", "1,000", "2,000"])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a pass, plain layout", fontsize=9)
    axes.set_title(title, **SUBTITLE)


def _draw_device_sizes(panels: Sequence[Any]) -> None:
    for axes, size in itertools.product(panels, DEVICES_GIB):
        axes.axhline(size, color=FAINT_INK, linewidth=0.8, linestyle=(0, (1, 2)))
    for size in DEVICES_GIB:  # in the middle, where no line is in the way
        place = {"xycoords": ("axes fraction", "data"), "xytext": (3, 1), "textcoords": "offset points"}
        panels[1].annotate(f"{size} GiB", (0, size), fontsize=7.5, color=FAINT_INK, **place)


def _draw_legend(axes: Any) -> None:
    """The sides, and what the styles of lines mean."""
    for side in reversed(SIDE_NAMES):
        axes.plot([], [], label=LABELS[side], **_look(side))
    for style, label in (("-", "checkpointing"), (":", "without")):
        axes.plot([], [], color=FAINT_INK, linestyle=style, label=label)
    axes.legend(loc="upper left", **LEGEND | {"fontsize": 7.5})


def _draw_vocabularies(axes: Any, cells: Sequence[Cell]) -> None:
    for side in reversed(SIDE_NAMES):
        line = [c for c in cells if c.side == side]
        axes.plot([(c.vocabulary or 0) / 1000 for c in line], [activations(c) / GIB for c in line], **_look(side))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vocabulary, thousands", fontsize=9)
    axes.set_ylabel(ABOVE, fontsize=9)
    axes.set_title("8B, 16k tokens, checkpointing", **SUBTITLE)


def _draw_completions(axes: Any, cells: Sequence[Cell]) -> None:
    for side in ("trl", "rankup"):
        of_side = [c for c in cells if c.side == side]
        look = _look(side) | {"linestyle": "none"}
        axes.plot([c.case.tokens for c in of_side], [activations(c) / GIB for c in of_side], **look)
    ours = [c for c in cells if c.side == "rankup"]
    most = max(ours, key=lambda c: c.case.tokens)
    axes.plot([0, most.case.tokens], [0, activations(most) / GIB], color=COLOURS[0], linewidth=1, alpha=0.5)
    for _, alike in itertools.groupby(sorted(ours, key=lambda c: c.case.tokens), key=lambda c: c.case.tokens // 100):
        first, *others = alike  # of about one size, with one text
        text = ", ".join(f"{c.generations} × {c.completion:,}" for c in (first, *others))
        place = (first.case.tokens, activations(first) / GIB)
        axes.annotate(text, place, xytext=(5, -12), textcoords="offset points", fontsize=8, color=FAINT_INK)
    axes.set(xlim=(0, 1.15 * most.case.tokens), ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("P + G (R - 1), tokens; labels are G × R", fontsize=9)
    axes.set_ylabel(ABOVE, fontsize=9)
    axes.set_title(f"8B, a prompt of {PROMPT:,}, no checkpointing", **SUBTITLE)

