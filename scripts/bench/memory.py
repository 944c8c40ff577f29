#!/usr/bin/env python3
"""The peak memory of one training step, without a GPU and without weights: rankup against PEFT, 8B to 32B, 2k to 64k tokens.

The real code runs on fake tensors, which have sizes and no memory. Every tensor's bytes are counted from the operation that
makes it to its end (`grpo/memory/step_memory.py`, with which `rankup plan` measures too). A measurement is the last pass of
an update, over one prompt with its completions, and the optimizer's step, by the sides of `memory_sides.py`: gradients of
earlier passes and the optimizer's state are in memory. The tables show what `rankup plan` computes next to rankup's peak.

examples:
  scripts/bench/memory.py --json memory.json                           measure everything, ten minutes of one core
  scripts/bench/memory.py --models 8B --sides rankup --parts lengths   some of it, on the terminal
  scripts/bench/memory.py --read docs/performance/memory.json --page docs/memory.md --plot docs/memory.png
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cases import Case
from common import replace_tables, script_parser, summary, versions, write_json
from scaling import LLAMA_8B

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
    """One measurement, a prompt with its completions.

    Attributes:
        part: of the page.
        vocabulary: None: that of the model.
        state, peak: bytes between two updates, and at the peak of one, if it was measured.
    """

    part: str
    model: str
    side: str
    rank: int
    gradient_checkpointing: bool
    prompt: int
    completion: int
    generations: int
    vocabulary: int | None = None
    state: int = 0
    peak: int = 0

    @property
    def case(self) -> Case:
        return Case(self.prompt, self.completion, prompts=1, completions=self.generations)

    @property
    def plain_tokens(self) -> int:
        """G (P + R): tokens of its rows."""
        return self.generations * (self.prompt + self.completion)


def cells() -> Iterator[Cell]:
    """All cells of the page."""
    usual: dict[str, Any] = {"model": "8B", "rank": 64, "gradient_checkpointing": True}
    for model, side, (rank, checkpointing) in itertools.product(MODELS, SIDE_NAMES, ((64, True), (64, False), (128, True))):
        adapter: dict[str, Any] = {"model": model, "rank": rank, "gradient_checkpointing": checkpointing}
        for length in LENGTHS if rank == 64 else LENGTHS_AT_RANK_128:
            yield Cell(part="lengths", side=side, **adapter, **_sizes(length))
    for side, vocabulary in itertools.product(SIDE_NAMES, VOCABULARIES):
        yield Cell(part="vocabularies", side=side, **usual, **_sizes(OF_VOCABULARIES), vocabulary=vocabulary)
    for side, checkpointing, (completion, generations) in itertools.product(SIDE_NAMES[:2], (False, True), COMPLETIONS):
        sizes: dict[str, Any] = {"prompt": PROMPT, "completion": completion, "generations": generations}
        yield replace(Cell(part="completions", side=side, **usual, **sizes), gradient_checkpointing=checkpointing)


def _sizes(length: int) -> dict[str, Any]:
    """Of a group that takes `length` tokens in the plain layout, a quarter of each row the prompt."""
    row = length // GENERATIONS
    return {"prompt": row // 4, "completion": row - row // 4, "generations": GENERATIONS}


def main() -> None:
    """Measure or read; write and draw the requested outputs."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    for name, values in (("models", MODELS), ("sides", SIDE_NAMES), ("parts", PARTS)):
        add(f"--{name}", nargs="+", choices=list(values), default=list(values), help="only these (default all)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--read", type=Path, metavar="FILE", help="measure nothing: read the figures from there")
    add("--page", type=Path, metavar="FILE", help="renew the tables of this Markdown page")
    add("--plot", type=Path, metavar="FILE", help="draw the picture there")
    options = parser.parse_args()
    if options.read is not None:
        found = [Cell(**row) for row in json.loads(options.read.read_text())["cells"]]
    else:
        of_models = [c for c in cells() if c.model in options.models]
        found = measure_all(c for c in of_models if c.side in options.sides and c.part in options.parts)
    if options.json is not None:
        write_json(options.json, {"what": summary(__doc__), "versions": versions(), "cells": [asdict(cell) for cell in found]})
    if options.page is not None:
        from memory_report import tables

        options.page.write_text(replace_tables(options.page.read_text(), tables(found)))
    if options.plot is not None:
        from memory_report import draw

        draw(found, options.plot)


def measure_all(chosen: Iterable[Cell]) -> list[Cell]:
    """The cells with their figures. Cells of one model and adapter share these."""
    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    found = []
    for (model, vocabulary, side, rank, checkpointing), group in itertools.groupby(
        chosen, key=lambda c: (c.model, c.vocabulary, c.side, c.rank, c.gradient_checkpointing)
    ):
        same, config = list(group), config_of(model, vocabulary)
        figures = measure(config, side, [c.case for c in same], rank=rank, gradient_checkpointing=checkpointing)
        for cell, (state, peak) in zip(same, figures, strict=True):
            found.append(replace(cell, state=state, peak=peak))
            print(f"{_name(cell)}: {peak / 2**30:.1f} GiB", file=sys.stderr)
    return found


def config_of(model: str, vocabulary: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model, with `vocabulary` unless it is None."""
    return MODELS[model] | OF_ALL | ({} if vocabulary is None else {"vocab_size": vocabulary})


def measure(
    config: dict[str, Any], side: str, cases: Sequence[Case], *, rank: int, gradient_checkpointing: bool
) -> list[tuple[int, int]]:
    """For each case, the bytes between two updates, and those at the peak of an update as on CUDA."""
    from memory_sides import SIDES, trls_paths_of_cuda

    from rankup.grpo.memory.step_memory import fake_tensors
    from rankup.kernels.device import paths_of_cuda

    measured, smallest = [], Case(2, 2, prompts=1, completions=2)
    with (
        tempfile.TemporaryDirectory(prefix="rankup-memory-") as folder,
        fake_tensors() as memory,
        paths_of_cuda(),
        trls_paths_of_cuda(),
    ):
        Path(folder, "config.json").write_text(json.dumps(config))
        one = SIDES[side](Path(folder), rank=rank, gradient_checkpointing=gradient_checkpointing)
        one.add_gradients(smallest)
        one.update()  # from here on there is the optimizer's state
        one.optimizer.zero_grad(set_to_none=True)
        state = memory.now
        one.add_gradients(smallest)  # the passes before the last one leave gradients
        before = memory.now
        for case in cases:
            memory.begin()
            one.add_gradients(case)
            one.update()
            assert memory.now == before, "a pass leaves nothing else behind"
            measured.append((state, memory.peak))
    return measured


def _name(cell: Cell) -> str:
    vocabulary = "" if cell.vocabulary is None else f" V {cell.vocabulary}"
    checkpointing = ", checkpointing" if cell.gradient_checkpointing else ""
    sizes = f"P {cell.prompt} R {cell.completion} G {cell.generations}"
    return f"{cell.model} {cell.side} rank {cell.rank}{vocabulary} {sizes}{checkpointing}"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
