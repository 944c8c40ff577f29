#!/usr/bin/env python3
"""What a step costs on many devices, by formulas and a simulation. Nothing here is measured.

A step of Llama-3.1-8B on workers that each hold the complete model: how many bytes cross the network and how long that takes,
on 8, 64 and 512 devices at ranks 64 and 128; how long a step is with a fixed batch (strong scaling) and with a fixed number of
completions per device (weak scaling), with completions of varying lengths, so that a step waits for its slowest worker. The
numbers of parameters are those of `rankup plan`. The model is in scaling_model.py, its assumptions in docs/scaling.md.

examples:
  scripts/bench/scaling.py                                           the tables of docs/scaling.md, half a minute
  scripts/bench/scaling.py --plot docs/scaling.png                   its picture
  scripts/bench/scaling.py --json scaling.json --repeats 100         all figures, with less noise
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command_line, with_markers, write_json
from scaling_model import (
    ETHERNET,
    H100,
    INFINIBAND,
    NETWORKS,
    RECORD_BYTES,
    Batch,
    Device,
    Model,
    Steps,
    all_reduce_seconds,
    network_seconds,
    simulate,
)

if TYPE_CHECKING:
    from rankup.grpo.memory.shapes import ModelShape

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
RANKS = (64, 128)
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (8, 64, 512)
STRONG_PROMPTS = (128, 1024)  # a step
WEAK_PROMPTS = 16  # a device and step


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the figures; print the tables, draw the picture and write the JSON file."""
    parser = command_line(__doc__, repeats=20, what="simulated steps of each size")
    parser.add_argument("--table", action="store_true", help="print the tables; the default without --plot and --json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture to this file")
    options = parser.parse_args(arguments)
    figures = compute(read_models(), repeats=options.repeats)
    if options.table or not (options.plot or options.json):
        from scaling_report import tables

        print("\n\n".join(with_markers(name, table) for name, table in tables(figures).items()))
    if options.plot is not None:
        from scaling_report import draw

        draw(figures, options.plot)
    if options.json is not None:
        write_json(options.json, figures)


def read_models() -> dict[int, Model]:
    """The model with an adapter of each rank, from the shapes of `rankup plan`."""
    shape = shape_of(LLAMA_8B)
    return {rank: Model.of(shape, rank) for rank in RANKS}


def shape_of(model_config: dict[str, Any]) -> ModelShape:
    """The shapes of a model by the content of its `config.json`."""
    from rankup.grpo.memory.shapes import read_shape

    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps(model_config))
        return read_shape(folder)


def compute(models: dict[int, Model], *, repeats: int) -> dict[str, Any]:
    """All figures: "assumptions", "adapters", "network", "strong", "weak", "settings"."""
    weak = {
        rank: {n: simulate(one, Batch(prompts=WEAK_PROMPTS * n), workers=n, repeats=repeats) for n in DEVICES}
        for rank, one in models.items()
    }
    strong = {
        str(prompts): [_row(simulate(models[64], Batch(prompts=prompts), workers=n, repeats=repeats)) for n in DEVICES]
        for prompts in STRONG_PROMPTS
    }
    return {
        "repeats": repeats,
        "assumptions": {
            "device": asdict(H100),
            "networks": [asdict(network) for network in NETWORKS],
            "batch": asdict(Batch(prompts=WEAK_PROMPTS)),
        },
        "adapters": {str(rank): one.adapter for rank, one in models.items()},
        "network": [_traffic(rank, one, n, weak[rank][n]) for rank, one in models.items() for n in SHOWN],
        "strong": strong,
        "weak": {str(rank): [_row(steps) for steps in of_rank.values()] for rank, of_rank in weak.items()},
        "settings": _settings(models, repeats),
    }


def _row(steps: Steps) -> dict[str, Any]:
    return asdict(steps) | {"seconds": steps.seconds, "busy": steps.busy}


def _traffic(rank: int, model: Model, workers: int, steps: Steps) -> dict[str, Any]:
    """Bytes and seconds of the collectives of a step, by network and algorithm; shares are of the step of weak scaling."""
    batch = Batch(prompts=WEAK_PROMPTS * workers)
    size, nodes = model.gradient_bytes, max(1, workers // INFINIBAND.node)
    found = []
    for network in NETWORKS:
        seconds = network_seconds(model, batch, workers, network)
        by_algorithm = {name: all_reduce_seconds(size, workers, network, name) for name in ("ring", "nodes", "tree")}
        share = seconds / (steps.seconds - steps.network + seconds)
        found.append({"name": network.name, "seconds": seconds, "share": share, "all_reduce": by_algorithm})
    return {
        "rank": rank,
        "workers": workers,
        "buffer_bytes": size,
        "sent_by_device": 2 * (workers - 1) / workers * size,
        "sent_by_node": 2 * (nodes - 1) / nodes * size,
        "records_received": batch.prompts * batch.generations * RECORD_BYTES,
        "networks": found,
    }


def _settings(models: dict[int, Model], repeats: int) -> list[dict[str, Any]]:
    """Weak scaling on the largest number of devices, under changed assumptions."""
    workers = DEVICES[-1]
    base = Batch(prompts=WEAK_PROMPTS * workers)
    as_on_data_sheet = Device(memory_share=1.0, compute_share=1.0, iteration_seconds=0.0)
    same_length = replace(base, median=736.0, prompt_sigma=0.0, completion_sigma=0.0)
    cases: list[tuple[str, Batch, Device, int]] = [
        ("as above: 128 completions per device, cap 4,096", base, H100, 64),
        *((f"{8 * n} completions per device", Batch(prompts=n * workers), H100, 64) for n in (8, 32, 64)),
        ("cap 2,048", replace(base, cap=2048), H100, 64),
        ("median 800, cap 8,192", replace(base, median=800.0, cap=8192), H100, 64),
        ("all prompts equally hard", replace(base, prompt_sigma=0.0), H100, 64),
        ("every completion 736 tokens, the mean", same_length, H100, 64),
        ("rank 128", base, H100, 128),
        ("devices at full data-sheet rates", base, as_on_data_sheet, 64),
    ]
    rows = []
    for name, batch, device, rank in cases:
        steps = simulate(models[rank], batch, workers=workers, device=device, repeats=repeats)
        network = network_seconds(models[rank], batch, workers, ETHERNET)
        share = network / (steps.seconds - steps.network + network)
        rows.append(_row(steps) | {"name": name, "ethernet_share": share})
    return rows


if __name__ == "__main__":
    main()
