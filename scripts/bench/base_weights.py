#!/usr/bin/env python3
"""What it costs and saves to share the base weights, and to hold them in NF4: the quick start's sampling, training and memory.

Four sides of the embedded model, each in a process of its own: `own` (`model.share_base_weights=false`), `auto`, `shared`
(`true`) and `nf4` (`model.load_in=nf4`, shared as `auto` does). A repeat samples 8 prompts x 16 completions of 24 tokens and
trains on them. Seconds are medians of interleaved repeats, beside them the speed over that of `own`; memory is that of the
whole process after one step.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from common import ROOT, Worker, command_line, machine, summarise, use_environment, versions, write_json

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
        from rollout_sides import EqualLengthEngine

        from rankup.grpo.common.model_files import resolve_model
        from rankup.grpo.common.quiet import quiet_stderr
        from rankup.grpo.config import load_config
        from rankup.grpo.experience.collect import engine_settings
        from rankup.grpo.update.learner import Learner
        from rankup.grpo.update.session import make_policy
        from rankup.kernels.cpu_memory import keep_freed_memory

        keep_freed_memory()
        config = load_config(ROOT / "configs" / "quickstart.yaml", ["guards.enabled=false", *overrides])
        with quiet_stderr():
            model_path = resolve_model(config.model.name)
            self._engine = EqualLengthEngine(engine_settings(config, model_path))
            self._policy = make_policy(config, model_path, self._engine)
        self._engine.publish(self._policy.write_slots)
        self._learner = Learner(self._policy, config)
        self._groups: list[PromptGroup] = []
        self._steps = 0

    def sample(self) -> float:
        """Seconds of a rollout."""
        from rankup.rollout.config import SamplingConfig

        sampling = SamplingConfig(num_generations=COMPLETIONS, max_completion_length=LENGTH)
        prompts = [[1, 504 + 7 * number, 3575, 282, 4649, 314] for number in range(PROMPTS)]
        started = time.perf_counter()
        self._groups = list(self._engine.rollout(prompts, sampling))
        return time.perf_counter() - started

    def train(self) -> float:
        """Seconds of an update on what was sampled."""
        from rankup.grpo.model.packing import WeightedGroup

        advantages = (1.0, -1.0) * (COMPLETIONS // 2)
        groups = [WeightedGroup(group=group, advantages=advantages) for group in self._groups]
        started = time.perf_counter()
        update = self._learner.update(groups, step=self._steps)
        self._engine.publish(self._policy.write_slots)
        assert update.metrics["updates"] == 1
        self._steps += 1
        return time.perf_counter() - started

    def memory(self) -> dict[str, int]:
        """Bytes: of the process, and of the trainer's base, its own and shared."""
        import ctypes
        from pathlib import Path

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
        base = self._policy.base
        return {"resident": resident, "own": base.own_bytes, "shared": base.shared_bytes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the JSON file."""
    options = _parse(arguments)
    seconds: dict[str, dict[str, list[float]]] = {side: {"sample": [], "train": []} for side in SIDES}
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(side, "base_weights:BaseSide", overrides=overrides))
            for side, overrides in SIDES.items()
        }
        for worker in workers.values():  # warm-up
            worker.call("sample")
            worker.call("train")
        memory = {side: worker.call("memory") for side, worker in workers.items()}
        for repeat in range(options.repeats):
            order = list(workers.items())
            for side, worker in order if repeat % 2 else reversed(order):
                for what in ("sample", "train"):
                    seconds[side][what].append(worker.call(what))
    result = {
        "what": " ".join((__doc__ or "").split()),
        "sides": {
            side: {"memory": memory[side], **{what: summarise(values) for what, values in seconds[side].items()}}
            for side in SIDES
        },
        "machine": machine(),
        "versions": versions(),
    }
    _show(result["sides"])
    if options.json is not None:
        write_json(options.json, result)


def _show(sides: dict[str, Any]) -> None:
    own = sides["own"]
    print(f"{'side':<8}{'sampling':>12}{'':>8}{'training':>12}{'':>8}{'resident':>12}{'base: own':>12}{'shared':>10}")
    for name, side in sides.items():
        seconds = {what: side[what]["median"] for what in ("sample", "train")}
        cells = "".join(f"{value:>10.2f} s{own[what]['median'] / value:>6.2f} x" for what, value in seconds.items())
        resident, base, shared = (side["memory"][key] / 2**20 for key in ("resident", "own", "shared"))
        print(f"{name:<8}{cells}{resident:>8.0f} MiB{base:>8.0f} MiB{shared:>6.0f} MiB")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command_line(__doc__, EXAMPLE, repeats=7, what="interleaved repeats").parse_args(arguments)


if __name__ == "__main__":
    use_environment()
    main()
