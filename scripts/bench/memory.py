#!/usr/bin/env python3
"""The peak memory of one training step, without a GPU and without weights: rankup against PEFT, 8B to 32B, 2k to 64k tokens.

    scripts/bench/memory.py --json docs/performance/memory.json                 # measure, about ten minutes of one core
    scripts/bench/memory.py --read docs/performance/memory.json --page docs/memory.md --plot docs/memory.png

The real code runs on fake tensors, which have sizes and no memory. Every tensor's bytes are counted from the operation that
makes it to its end (`grpo/cli/plan/step_memory.py`, with which `rankup plan` measures too). A measurement is the last pass of
an update, over one prompt with its completions, and the optimizer's step, by the sides of `memory_sides.py`: gradients of
earlier passes and the optimizer's state are in memory. The tables show what `rankup plan` computes next to rankup's peak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import use_environment, versions, write_json
from scaling import LLAMA_8B

if TYPE_CHECKING:
    from memory_sides import Group

EXAMPLE = """examples:
  scripts/bench/memory.py --json memory.json                           measure everything, ten minutes
  scripts/bench/memory.py --models 8B --sides rankup --parts lengths   some of it, on the terminal
  scripts/bench/memory.py --read docs/performance/memory.json --page docs/memory.md --plot docs/memory.png
"""
# Shapes as in their config.json: Llama-3.1-8B, Qwen2.5-14B, Qwen3-32B.
MODELS: dict[str, dict[str, Any]] = {
    "8B": LLAMA_8B,
    "14B": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
OF_ALL = {"tie_word_embeddings": False, "max_position_embeddings": 131072}
SIDE_NAMES = ("rankup", "trl", "peft")
PARTS = ("lengths", "vocabularies", "completions")
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)  # of a pass in the plain layout
LENGTHS_AT_RANK_128 = (2048, 16384, 65536)
GENERATIONS = 8
VOCABULARIES = (32_000, 64_000, 128_000, 152_064, 256_000)
OF_VOCABULARIES = 16384
PROMPT = 2048  # of the cells in which completions and generations grow
COMPLETIONS = ((512, 8), (1024, 4), (1024, 8), (1024, 16), (2048, 8), (4096, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement. `part`: of the page. `vocabulary` None: that of the model."""

    part: str
    model: str
    side: str
    rank: int
    gradient_checkpointing: bool
    prompt: int
    completion: int
    generations: int
    vocabulary: int | None = None

    @property
    def group(self) -> Group:
        from memory_sides import Group

        return Group(prompt=self.prompt, completion=self.completion, generations=self.generations)


def cells() -> list[Cell]:
    """All cells of the page."""
    found = []
    for model, side, (rank, checkpointing) in itertools.product(MODELS, SIDE_NAMES, ((64, True), (64, False), (128, True))):
        for length in LENGTHS if rank == 64 else LENGTHS_AT_RANK_128:
            found.append(_of_length("lengths", model, side, rank, checkpointing, length))
    for side, vocabulary in itertools.product(SIDE_NAMES, VOCABULARIES):
        found.append(_of_length("vocabularies", "8B", side, 64, True, OF_VOCABULARIES, vocabulary))
    for side, checkpointing, (completion, generations) in itertools.product(SIDE_NAMES[:2], (False, True), COMPLETIONS):
        sizes = {"prompt": PROMPT, "completion": completion, "generations": generations}
        found.append(
            Cell(part="completions", model="8B", side=side, rank=64, gradient_checkpointing=checkpointing, **sizes)
        )
    return found


def _of_length(
    part: str, model: str, side: str, rank: int, checkpointing: bool, length: int, vocabulary: int | None = None
) -> Cell:
    """A group of which the plain layout has `length` tokens, a quarter of each row the prompt."""
    row = length // GENERATIONS
    return Cell(
        part=part,
        model=model,
        side=side,
        rank=rank,
        gradient_checkpointing=checkpointing,
        prompt=row // 4,
        completion=row - row // 4,
        generations=GENERATIONS,
        vocabulary=vocabulary,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or read; print, write and draw the requested outputs."""
    options = _parse(arguments)
    if options.read is not None:
        result = json.loads(options.read.read_text())
    else:
        result = {"what": " ".join((__doc__ or "").split()), "versions": versions(), "cells": measure_all(_chosen(options))}
    if options.json is not None:
        write_json(options.json, result)
    from memory_report import draw, renew, tables

    if options.page is not None:
        renew(options.page, tables(result["cells"]))
    if options.plot is not None:
        draw(result["cells"], options.plot)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, values in (("models", MODELS), ("sides", SIDE_NAMES), ("parts", PARTS)):
        add(f"--{name}", nargs="+", choices=list(values), default=list(values), help="only these (default all)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--read", type=Path, metavar="FILE", help="measure nothing: read the figures from there")
    add("--page", type=Path, metavar="FILE", help="renew the tables of this Markdown page")
    add("--plot", type=Path, metavar="FILE", help="draw the picture there")
    return parser.parse_args(arguments)


def _chosen(options: argparse.Namespace) -> list[Cell]:
    return [
        cell
        for cell in cells()
        if cell.model in options.models and cell.side in options.sides and cell.part in options.parts
    ]


def measure_all(chosen: Iterable[Cell]) -> list[dict[str, Any]]:
    """The cells with "peak" and "state", the memory between two updates, in bytes. Cells of one model share it."""
    _quiet()
    rows = []
    for (model, vocabulary, side, rank, checkpointing), group in itertools.groupby(
        chosen, key=lambda c: (c.model, c.vocabulary, c.side, c.rank, c.gradient_checkpointing)
    ):
        same = list(group)
        measured = measure(
            shape_of(model, vocabulary), side, [c.group for c in same], rank=rank, gradient_checkpointing=checkpointing
        )
        for cell, (state, peak) in zip(same, measured, strict=True):
            rows.append(asdict(cell) | {"state": state, "peak": peak})
            print(f"{_name(cell)}: {peak / 2**30:.1f} GiB", file=sys.stderr)
    return rows


def shape_of(model: str, vocabulary: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model, with `vocabulary` unless it is None."""
    return MODELS[model] | OF_ALL | ({} if vocabulary is None else {"vocab_size": vocabulary})


def measure(
    config: dict[str, Any], side: str, groups: Sequence[Group], *, rank: int, gradient_checkpointing: bool
) -> list[tuple[int, int]]:
    """For each group, the bytes between two updates, and those at the peak of an update as on CUDA."""
    from memory_sides import SIDES, SMALLEST, trls_paths_of_cuda

    from rankup.grpo.cli.plan.step_memory import fake_tensors
    from rankup.kernels.device import paths_of_cuda

    measured = []
    with (
        tempfile.TemporaryDirectory(prefix="rankup-memory-") as folder,
        fake_tensors() as memory,
        paths_of_cuda(),
        trls_paths_of_cuda(),
    ):
        Path(folder, "config.json").write_text(json.dumps(config))
        one = SIDES[side](Path(folder), rank=rank, gradient_checkpointing=gradient_checkpointing)
        one.add_gradients(SMALLEST)
        one.apply_gradients()  # from here on there is the optimizer's state
        one.forget_gradients()
        state = memory.now
        one.add_gradients(SMALLEST)  # the passes before the last one leave gradients
        before = memory.now
        for group in groups:
            memory.begin()
            one.add_gradients(group)
            one.apply_gradients()
            assert memory.now == before, "a pass leaves nothing else behind"
            measured.append((state, memory.peak))
    return measured


def _name(cell: Cell) -> str:
    vocabulary = "" if cell.vocabulary is None else f" V {cell.vocabulary}"
    checkpointing = ", checkpointing" if cell.gradient_checkpointing else ""
    sizes = f"P {cell.prompt} R {cell.completion} G {cell.generations}"
    return f"{cell.model} {cell.side} rank {cell.rank}{vocabulary} {sizes}{checkpointing}"


def _quiet() -> None:
    """Silence warnings about missing optional libraries, and about addresses of fake tensors."""
    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")


if __name__ == "__main__":
    use_environment()
    with suppress(KeyboardInterrupt):
        main()
