#!/usr/bin/env python3
"""Costs and savings of sharing the base weights, or of storing them in NF4: sampling, training and memory of the quick start.

Four sides of the embedded model, each in a separate process: `own` (`model.share_base_weights=false`), `auto`, `shared`
(`true`) and `nf4` (`model.load_in=nf4`, shared as `auto` does). A repeat samples 8 prompts x 16 completions of 24 tokens and
trains on them. Seconds are medians of interleaved repeats, next to the speed relative to `own`; memory is that of the
process after one step.

examples:
  scripts/bench/base_weights.py --json base_weights.json     about six minutes on two idle cores
  scripts/bench/base_weights.py --repeats 1                  a quick look
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from common import Result, command_line, interleave, markdown, run, summarise
from workers import Worker

PROMPTS, COMPLETIONS, LENGTH = 8, 16, 24
SIDES = {
    "own": ["model.share_base_weights=false"],
    "auto": [],
    "shared": ["model.share_base_weights=true"],
    "nf4": ["model.load_in=nf4"],
}


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    run(command_line(__doc__, repeats=7, what="interleaved repeats").parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Memory after a warm-up, then seconds of sampling and training."""
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(side, "rollout_sides:TrainingSide", overrides=overrides))
            for side, overrides in SIDES.items()
        }

        def sample_and_train(side: str) -> tuple[float, float]:
            return workers[side].call("sample", PROMPTS, COMPLETIONS, LENGTH), workers[side].call("train")

        for side in SIDES:
            sample_and_train(side)
        memory = {side: worker.call("memory") for side, worker in workers.items()}
        seconds = interleave(SIDES, options.repeats, sample_and_train)
    sides = {}
    for side, pairs in seconds.items():
        sample, train = map(summarise, zip(*pairs, strict=True))
        sides[side] = {"memory": memory[side], "sample": sample, "train": train}
    return {"sides": sides}


def report(result: Result) -> str:
    """Seconds, speed relative to `own`, and memory of each side."""
    own, rows = result["sides"]["own"], []
    for name, side in result["sides"].items():
        pairs = [(side[what]["median"], own[what]["median"]) for what in ("sample", "train")]
        times = [text for seconds, of_own in pairs for text in (f"{seconds:.2f} s", f"{of_own / seconds:.2f} x")]
        rows.append([name, *times, *(f"{side['memory'][key] / 2**20:.0f} MiB" for key in ("resident", "own", "shared"))])
    heads = ["side", "sampling", "speed", "training", "speed", "resident", "base: own", "base: shared"]
    return markdown(heads, rows, left=1)


if __name__ == "__main__":
    main()
