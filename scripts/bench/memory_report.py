"""The tables and the picture of docs/memory.md, from the figures of `memory.py`.

    tables(figures["cells"])["vocabularies"]                # Markdown
    renew(Path("docs/memory.md"), tables(figures["cells"])) # between the page's markers
    draw(figures["cells"], Path("docs/memory.png"))

The predictions of `rankup plan` are computed here, so that the page compares the current planner with the measured figures.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory import PROMPT, SIDE_NAMES, shape_of
from report import MARKER
from report_tables import markdown

from rankup.grpo.cli.plan.memory import FP32, changed, training_parts
from rankup.grpo.cli.plan.shapes import ModelShape, read_shape
from rankup.grpo.config import GRPOConfig
from rankup.grpo.run.plots import COLOURS, FAINT_INK, MARKERS, STYLE

GIB = 2**30
Row = dict[str, Any]
NOT_SEEN = ("gaps", "runtime", "guards_snapshot")
"""Parts of the plan that no tensor is: the allocator's gaps, the context with its libraries, and a copy on the host."""
LABELS = {"rankup": "rankup", "trl": "PEFT, TRL's chunked head", "peft": "PEFT, full logits"}
NAMES = {"8B": "Llama-3.1-8B", "14B": "Qwen2.5-14B", "32B": "Qwen3-32B"}
DEVICES_GIB = (24, 80, 141)
ABOVE = "above weights, gradients and AdamW, GiB"


# ---------------------------------------------------------------------------------------------------------------- plan


@functools.cache
def _shape(model: str, vocabulary: int | None) -> ModelShape:
    with tempfile.TemporaryDirectory(prefix="rankup-memory-") as folder:
        Path(folder, "config.json").write_text(json.dumps(shape_of(model, vocabulary)))
        return read_shape(folder)


def planned(row: Row) -> int:
    """The prediction of `rankup plan` for the measured parts, in bytes. The base counts once: in a run it is vLLM's copy."""
    config = GRPOConfig(
        model={"share_base_weights": False},
        lora={"rank": row["rank"]},
        rollout={
            "num_generations": row["generations"],
            "max_prompt_length": row["prompt"],
            "max_completion_length": row["completion"],
        },
        optim={"tokens_per_pack": _shared(row), "gradient_checkpointing": row["gradient_checkpointing"]},
    )
    config = changed(config, {"lora.max_rank": row["rank"]})
    parts = training_parts(_shape(row["model"], row["vocabulary"]), config, "cuda")
    return sum(size for name, size in parts.items() if name not in NOT_SEEN)


def _shared(row: Row) -> int:
    """P + G (R - 1): tokens of the group with its prompt once."""
    return row["prompt"] + row["generations"] * (row["completion"] - 1)


def _plain(row: Row) -> int:
    """G (P + R): tokens of its rows."""
    return row["generations"] * (row["prompt"] + row["completion"])


def activations(row: Row) -> int:
    """What an update takes at its peak beyond its state and the adapter's gradients, in bytes."""
    adapter = row["rank"] * _shape(row["model"], row["vocabulary"]).parameters_per_rank("all-linear")
    return row["peak"] - row["state"] - FP32 * adapter


# -------------------------------------------------------------------------------------------------------------- tables


def tables(cells: Sequence[Row]) -> dict[str, str]:
    """Those of the page, by name; parts that were not measured are left out."""
    of_rank = {rank: [c for c in cells if c["part"] == "lengths" and c["rank"] == rank] for rank in (64, 128)}
    with_it, without = ([c for c in of_rank[64] if c["gradient_checkpointing"] is on] for on in (True, False))
    found = {"checkpointing": _lengths(with_it), "kept": _lengths(without), "rank128": _lengths(of_rank[128])}
    found["vocabularies"] = _vocabularies([c for c in cells if c["part"] == "vocabularies"])
    found["completions"] = _completions([c for c in cells if c["part"] == "completions"])
    return found


def renew(page: Path, made: Mapping[str, str]) -> None:
    """Put the tables between their markers on the page."""
    text = MARKER.sub(lambda found: f"<!-- table: {found['name']} -->\n{made[found['name']]}\n<!-- end -->", page.read_text())
    page.write_text(text)


def _side_by_side(cells: Iterable[Row]) -> list[dict[str, Row]]:
    """Cells of the same model and group, by side, in their order."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    keys = ("model", "rank", "gradient_checkpointing", "prompt", "completion", "generations", "vocabulary")
    for cell in cells:
        found.setdefault(tuple(cell[key] for key in keys), {})[cell["side"]] = cell
    return [sides for sides in found.values() if len(sides) > 1]


def _lengths(cells: Sequence[Row]) -> str:
    heads = ["model", "tokens, plain", "tokens, prompt once", *LABELS.values(), "`rankup plan` / measured"]
    rows = [
        [
            NAMES[sides["rankup"]["model"]],
            f"{_plain(sides['rankup']):,}",
            f"{_shared(sides['rankup']):,}",
            *(_gib(sides[name]["peak"]) for name in SIDE_NAMES),
            f"{planned(sides['rankup']) / sides['rankup']['peak']:.3f}",
        ]
        for sides in _side_by_side(cells)
    ]
    return markdown(heads, rows, left=1)


def _vocabularies(cells: Sequence[Row]) -> str:
    heads = ["vocabulary", "its weights, head and embedding", *LABELS.values()]
    rows = []
    for sides in _side_by_side(cells):
        vocabulary = sides["rankup"]["vocabulary"]
        weights = 2 * 2 * vocabulary * _shape("8B", vocabulary).hidden
        rows.append([f"{vocabulary:,}", _gib(weights), *(_gib(activations(sides[name])) for name in SIDE_NAMES)])
    return markdown(heads, rows, left=0)


def _completions(cells: Sequence[Row]) -> str:
    heads = ["R", "G", "P + G (R - 1)", "G (P + R)"]
    heads += [f"{LABELS[name]}{also}" for also in ("", ", checkpointing") for name in ("rankup", "trl")]
    kept, again = ([s for s in _side_by_side(cells) if s["rankup"]["gradient_checkpointing"] is on] for on in (False, True))
    rows = []
    for one, other in zip(kept, again, strict=True):
        row = one["rankup"]
        figures = [_with_density(sides[name], _shared(row)) for sides in (one, other) for name in ("rankup", "trl")]
        rows.append([f"{row['completion']:,}", str(row["generations"]), f"{_shared(row):,}", f"{_plain(row):,}", *figures])
    return markdown(heads, rows, left=0)


def _with_density(row: Row, tokens: int) -> str:
    """`12.3, 1,024`: GiB of activations, and KiB for each token."""
    return f"{_gib(activations(row))}, {activations(row) / tokens / 1024:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= 10 * GIB else f"{size / GIB:.2f}"


# ------------------------------------------------------------------------------------------------------------- picture


def draw(cells: Sequence[Row], out: Path) -> None:
    """Peaks by tokens for each model, then by vocabulary and by P + G R, into one PNG of 2,000 x 1,600 pixels."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(STYLE):
        picture = Figure(figsize=(10, 8), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        grid = picture.add_gridspec(2, 6)
        above = [picture.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3)]
        for axes, model in zip(above, NAMES, strict=True):
            _by_length(axes, [c for c in cells if c["part"] == "lengths" and c["rank"] == 64 and c["model"] == model], model)
        left, right = picture.add_subplot(grid[1, :3]), picture.add_subplot(grid[1, 3:])
        _by_vocabulary(left, [c for c in cells if c["part"] == "vocabularies"])
        _by_completions(right, [c for c in cells if c["part"] == "completions"])
        above[0].set_ylabel("peak of an update, GiB")
        for axes in (*above, left, right):
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=9)
            axes.grid(axis="y")
        _legend(above[0])
        picture.suptitle("Memory of a training step, on fake tensors", x=0.02, ha="left", fontsize=14, fontweight="bold")
        where = "rank 64 on all linear layers, base in bf16 and held once; counted tensor by tensor, no GPU was involved"
        picture.supxlabel(where, x=0.02, ha="left", fontsize=9, color=FAINT_INK)
        picture.savefig(out)


def _look(side: str) -> dict[str, Any]:
    index = SIDE_NAMES.index(side)
    return {"color": COLOURS[index], "marker": MARKERS[index], "markerfacecolor": "white", "linewidth": 2, "markersize": 6}


def _by_length(axes: Any, cells: Sequence[Row], model: str) -> None:
    for side in reversed(SIDE_NAMES):
        for checkpointing, style in ((True, "-"), (False, ":")):
            rows = [c for c in cells if c["side"] == side and c["gradient_checkpointing"] is checkpointing]
            axes.plot([_plain(c) for c in rows], [c["peak"] / GIB for c in rows], linestyle=style, **_look(side))
    for size in DEVICES_GIB:
        axes.axhline(size, color=FAINT_INK, linewidth=0.8, linestyle=(0, (1, 2)))
        if model == "14B":  # where no line is in the way
            place = {"xycoords": ("axes fraction", "data"), "xytext": (3, 1), "textcoords": "offset points"}
            axes.annotate(f"{size} GiB", (0, size), fontsize=7.5, color=FAINT_INK, **place)
    ticks = sorted({_plain(c) for c in cells})
    axes.set(xscale="log", yscale="log", ylim=(14, 2600))
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks], fontsize=9)
    axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000], ["20", "50", "100", "200", "500", "1,000", "2,000"], fontsize=9)
    axes.minorticks_off()
    axes.set_xlabel("tokens of a pass, plain layout", fontsize=9)
    axes.set_title(NAMES[model], loc="left", fontsize=11, color=FAINT_INK)


def _by_vocabulary(axes: Any, cells: Sequence[Row]) -> None:
    for side in reversed(SIDE_NAMES):
        rows = [c for c in cells if c["side"] == side]
        axes.plot([c["vocabulary"] / 1000 for c in rows], [activations(c) / GIB for c in rows], **_look(side))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vocabulary, thousands", fontsize=9)
    axes.set_ylabel(ABOVE, fontsize=9)
    axes.set_title("8B, 16k tokens, checkpointing", loc="left", fontsize=11, color=FAINT_INK)


def _by_completions(axes: Any, cells: Sequence[Row]) -> None:
    for side in ("trl", "rankup"):
        rows = sorted(
            (c for c in cells if c["side"] == side and not c["gradient_checkpointing"]), key=lambda c: (_shared(c), _plain(c))
        )
        look = _look(side) | {"linestyle": "none"}
        axes.plot([_shared(c) for c in rows], [activations(c) / GIB for c in rows], **look)
    ours = [c for c in cells if c["side"] == "rankup" and not c["gradient_checkpointing"]]
    most = max(ours, key=_shared)
    axes.plot([0, _shared(most)], [0, activations(most) / GIB], color=COLOURS[0], linewidth=1, alpha=0.5)
    texts: dict[int, list[str]] = {}  # of groups of about one size together
    for cell in ours:
        texts.setdefault(_shared(cell) // 100, []).append(f"{cell['generations']} × {cell['completion']:,}")
    for cell in ours:
        text = ", ".join(texts.pop(_shared(cell) // 100, []))
        place = (_shared(cell), activations(cell) / GIB)
        axes.annotate(text, place, xytext=(5, -12), textcoords="offset points", fontsize=8, color=FAINT_INK)
    axes.set(xlim=(0, 1.15 * _shared(most)), ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("P + G (R - 1), tokens; labels are G × R", fontsize=9)
    axes.set_ylabel(ABOVE, fontsize=9)
    axes.set_title(f"8B, a prompt of {PROMPT:,}, no checkpointing", loc="left", fontsize=11, color=FAINT_INK)


def _legend(axes: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=LABELS[side], **_look(side)) for side in reversed(SIDE_NAMES)]
    handles.append(Line2D([], [], color=FAINT_INK, linestyle="-", label="checkpointing"))
    handles.append(Line2D([], [], color=FAINT_INK, linestyle=":", label="without"))
    axes.legend(handles=handles, loc="upper left", fontsize=7.5, framealpha=0.9, edgecolor="none")
