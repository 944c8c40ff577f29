#!/usr/bin/env python3
"""Costs and savings of sharing the base weights, or of storing them in NF4: sampling, training and memory of the quick start.

Four sides of the embedded model, each in a separate process: `own` (`model.share_base_weights=false`), `auto`, `shared`
(`true`) and `nf4` (`model.load_in=nf4`, shared as `auto` does). A repeat samples 8 prompts x 16 completions of 24 tokens and
trains on them. Seconds are medians of interleaved repeats, next to the speed relative to `own`; memory is that of the
process after one step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from common import Result, command_line, interleave, run, summarise, use_environment
from report_tables import markdown
from workers import Worker

if TYPE_CHECKING:
    from rankup.rollout.types import PromptGroup

EXAMPLE = """examples:
  scripts/bench/base_weights.py --json base_weights.json     about six minutes on two idle cores
  scripts/bench/base_weights.py --repeats 1                  a quick look
"""
PROMPTS, COMPLETIONS, LENGTH = 8, 16, 24
SIDES = {
    "own": ["model.share_base_weights=false"],
    "auto": [],
    "shared": ["model.share_base_weights=true"],
    "nf4": ["model.load_in=nf4"],
}


class BaseSide:
    """Engine, policy and learner of the quick start with some options changed."""

    def __init__(self, *, overrides: Sequence[str]) -> None:
        from rollout_sides import QuickstartSide

        from rankup.grpo.update.learner import Learner

        self._side = QuickstartSide(["guards.enabled=false", *overrides])
        self._side.publish_adapter()
        self._learner = Learner(self._side.policy, self._side.config)
        self._groups: list[PromptGroup] = []
        self._steps = 0

    def sample(self) -> float:
        """Seconds of a rollout."""
        prompts = [[1, 504 + 7 * number, 3575, 282, 4649, 314] for number in range(PROMPTS)]
        started = time.perf_counter()
        self._groups = self._side.sample_groups(prompts, COMPLETIONS, LENGTH)
        return time.perf_counter() - started

    def train(self) -> float:
        """Seconds of an update on the latest rollout."""
        from rankup.grpo.data.groups import Group
        from rankup.grpo.data.prompts import Prompt

        advantages = (1.0, -1.0) * (COMPLETIONS // 2)
        groups = [
            Group(
                prompt=Prompt(content="", token_ids=one.prompt_token_ids),
                completions=one.completions,
                advantages=advantages,
            )
            for one in self._groups
        ]
        started = time.perf_counter()
        update = self._learner.update(groups, step=self._steps)
        self._side.publish_adapter()
        assert update.metrics["updates"] == 1
        self._steps += 1
        return time.perf_counter() - started

    def memory(self) -> dict[str, int]:
        """Resident bytes of the process, and bytes of base weights that the trainer owns and shares."""
        from process_memory import resident_bytes, return_freed_memory

        return_freed_memory()
        base = self._side.policy.base
        return {"resident": resident_bytes("VmRSS"), "own": base.unshared_bytes, "shared": base.shared_bytes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    run(command_line(__doc__, EXAMPLE, repeats=7, what="interleaved repeats").parse_args(arguments), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Memory after a warm-up, then seconds of sampling and training."""
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(side, "base_weights:BaseSide", overrides=overrides))
            for side, overrides in SIDES.items()
        }
        for worker in workers.values():
            worker.call("sample")
            worker.call("train")
        memory = {side: worker.call("memory") for side, worker in workers.items()}
        seconds = interleave(SIDES, options.repeats, lambda side: [workers[side].call(what) for what in ("sample", "train")])
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
    use_environment()
    main()
