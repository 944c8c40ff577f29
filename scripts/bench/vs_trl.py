#!/usr/bin/env python3
"""How long a whole GRPO step takes, against TRL's own GRPOTrainer with vLLM in its process (vllm_mode="colocate").

A step is 8 prompts x 8 completions of exactly 32 tokens (neither side stops at an end-of-text token, so both compute the
same number), SmolLM2-135M-Instruct in bf16, LoRA of rank 64 on all seven projections with fp32 masters, one optimizer step.
What is timed is all of it: the new weights go to vLLM, completions are sampled and scored, log-probabilities, forward,
backward, optimizer, and what a trainer does between two steps. The reward is a hash of the token ids, so every group has
variance and neither side can leave work out.

Both sides run their public trainer's `train()` in a process of its own, halted between steps: repeats are interleaved, and
a side sleeps while another is measured (how much processor time the sleepers took is in the result), and its first step after
a sleep is not measured. `trl` is TRL with its defaults, of which gradient checkpointing is one; `trl_tuned` is TRL without
checkpointing, keeping the memory that torch frees as rankup does (`kernels/cpu_memory.py`). Each is compared with the steps of
rankup that were measured in turn with it. What vLLM on CPU needs to work with TRL at all is in the result as
`trl_side_changes`.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import Worker, command_line, machine, summarise, use_environment, versions, write_json

EXAMPLE = """examples:
  scripts/bench/vs_trl.py --json vs_trl.json       the whole comparison on two idle cores
  scripts/bench/vs_trl.py --repeats 1              a quick look
"""
PROMPTS, COMPLETIONS, TOKENS = 8, 8, 32
RANK, ALPHA, LEARNING_RATE = 64, 32, 1e-4
WARM_UPS = 5  # steps of each side that are not measured: until a process has the memory that it works in
# Each side trains in a thread of its own. glibc gives threads heaps of their own, which neither keep freed memory nor learn
# what size to map as a program's own heap does: with one heap for all, memory is as in a program's main thread.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
SIDES = {
    "rankup": "rankup",
    "trl": "TRL",
    "trl_tuned": "TRL, tuned",
}


def score_by_hash(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """A number in [0, 1) for each completion that depends on its token ids alone: distinct completions, distinct rewards."""
    texts = [" ".join(map(str, ids)) for ids in completion_ids]
    digests = [hashlib.blake2b(text.encode(), digest_size=6).digest() for text in texts]
    return [int.from_bytes(digest, "little") / 2**48 for digest in digests]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    options = _parse(arguments)
    before = machine()
    if before["load_average"] > 0.5:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): steps will take longer")
    os.environ.update(ENVIRONMENT)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankup-bench-"))
        stack.enter_context(_children_end_on_interrupt())
        bench = StepBench(stack, Path(folder), micro_batch=options.micro_batch)
        bench.measure("trl", options.repeats, tuned=False)
        bench.measure("trl_tuned", options.repeats, tuned=True)
        result = bench.result() | {"machine": before, "versions": versions()}
    _show(result)
    if options.json is not None:
        write_json(options.json, result)
        print(f"written to {options.json}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, EXAMPLE, repeats=5, what="measured steps of each side")
    parser.add_argument(
        "--micro-batch", type=int, default=8, metavar="N", help="completions that TRL trains on at a time (default 8)"
    )
    options = parser.parse_args(arguments)
    if options.micro_batch < 1 or PROMPTS * COMPLETIONS % options.micro_batch:
        parser.error(f"--micro-batch must divide the {PROMPTS * COMPLETIONS} completions of a step")
    return options


@contextmanager
def _children_end_on_interrupt() -> Iterator[None]:
    """End the sides at once on Ctrl-C: one of them may be within a step of half a minute, another still starting."""
    try:
        yield
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


class StepBench:
    """The sides and the steps that were measured with them."""

    def __init__(self, stack: ExitStack, folder: Path, *, micro_batch: int) -> None:
        self._folder = folder
        self._micro_batch = micro_batch
        self.steps: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        self.speedups: dict[str, float] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.idle_share = 0.0
        self._rankup = stack.enter_context(self._start("rankup", "RankupSide"))

    def _start(self, name: str, side: str, **options: Any) -> Worker:
        """Make a side and warm it up."""
        print(f"starting {SIDES[name]}, {WARM_UPS} steps to warm up", flush=True)
        worker = Worker(SIDES[name], f"vs_trl_sides:{side}", folder=self._folder, **options)
        for _ in range(WARM_UPS - 1):  # making a side took its first step
            worker.call("step")
        return worker

    def measure(self, name: str, repeats: int, *, tuned: bool) -> None:
        """Measure steps of one of TRL's sides and of rankup in turns. Two of TRL's sides would not fit in memory at once."""
        with self._start(name, "TrlSide", tuned=tuned, micro_batch=self._micro_batch) as trl:
            pair = [("rankup", self._rankup), (name, trl)]
            steps: dict[str, list[dict[str, Any]]] = {side: [] for side, _ in pair}
            for repeat in range(repeats):
                for (side, worker), (_, sleeper) in zip(pair, reversed(pair), strict=True):
                    steps[side].append(self._step(worker, sleeper))
                latest = ", ".join(f"{SIDES[side]} {steps[side][-1]['seconds']:.1f} s" for side in steps)
                print(f"repeat {repeat + 1} of {repeats}: {latest}", flush=True)
                pair.reverse()
            self.about |= {side: worker.call("describe") for side, worker in pair}
        ours, theirs = (statistics.median(step["seconds"] for step in steps[side]) for side in ("rankup", name))
        self.speedups[name] = theirs / ours
        for side, measured in steps.items():
            self.steps[side] += measured

    def _step(self, worker: Worker, sleeper: Worker) -> dict[str, Any]:
        """One step of a side, while the other must sleep. The first one after it has slept itself is not measured."""
        worker.call("step")
        before = sleeper.cpu_seconds()
        step = worker.call("step")
        self.idle_share = max(self.idle_share, (sleeper.cpu_seconds() - before) / step["seconds"])
        assert step["lengths"] == [TOKENS, TOKENS], "shortest and longest completion have the full length"
        assert step["groups_without_variance"] == 0.0, "every group has something to teach"
        return step

    def result(self) -> dict[str, Any]:
        """The figures, machine and versions aside."""
        about = self.about
        seconds = {name: summarise([step["seconds"] for step in steps]) for name, steps in self.steps.items()}
        tuned = seconds.pop("trl_tuned")
        changes = [about[name].pop("changes") for name in ("trl", "trl_tuned")]
        return {
            "speedup": self.speedups["trl"],
            "step_seconds": seconds,
            "trl_tuned": {"speedup": self.speedups["trl_tuned"], "step_seconds": tuned},
            "phases": {name: _phases(steps) for name, steps in self.steps.items()},
            "tokens": {
                "completions": PROMPTS * COMPLETIONS,
                "tokens_per_completion": TOKENS,
                "sampled_per_step": PROMPTS * COMPLETIONS * TOKENS,
                "with_prompts_per_step": {
                    name: summarise([step["tokens"] for step in steps]) for name, steps in self.steps.items()
                },
            },
            "sampling_logp_difference": {
                name: summarise([step["sampling_logp_difference"] for step in steps]) for name, steps in self.steps.items()
            },
            "peak_memory_gib": {name: about[name].pop("peak_memory_gib") for name in SIDES},
            "idle_sides_cpu_share": self.idle_share,
            "what": " ".join((__doc__ or "").split()),
            "trl_side_changes": changes[0],
            "settings": {
                "prompts": PROMPTS,
                "completions_per_prompt": COMPLETIONS,
                "rank": RANK,
                "alpha": ALPHA,
                "objective": "dapo, beta 0, num_iterations 1, advantages divided by the group's standard deviation",
                "warm_up_steps": WARM_UPS,
                "environment": ENVIRONMENT,
                "rankup": about["rankup"],
                "trl": about["trl"],
                "trl_tuned": about["trl_tuned"],
            },
        }


def _phases(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of each phase; `other` is what a trainer does besides."""
    phases = {name: summarise([step["phases"][name] for step in steps]) for name in steps[0]["phases"]}
    return phases | {"other": summarise([step["seconds"] - sum(step["phases"].values()) for step in steps])}


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cpu, tokens = result["machine"], result["tokens"]
    title = f"seconds of a GRPO step of {tokens['completions']} x {tokens['tokens_per_completion']} tokens"
    table = Table(title=f"{title}, {cpu['cores']} cores of {cpu['cpu']}")
    for column in ("", "step", "spread", "runs", "rollout", "train", "weights to vLLM", "peak GiB"):
        table.add_column(column, justify="left" if not column else "right")
    tuned = result["trl_tuned"]
    seconds = result["step_seconds"] | {"trl_tuned": tuned["step_seconds"]}
    for name, label in SIDES.items():
        step, phases = seconds[name], result["phases"][name]
        parts = [f"{phases[phase]['median']:.2f}" for phase in ("rollout", "train", "publish")]
        spread = f"{step['min']:.2f} to {step['max']:.2f}"
        memory = f"{result['peak_memory_gib'][name]:.1f}"
        table.add_row(label, f"{step['median']:.2f}", spread, str(len(step["all"])), *parts, memory)
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    console.print(
        f"{result['speedup']:.1f} times as fast as TRL, {tuned['speedup']:.1f} times as fast as TRL when tuned\n"
        f"idle sides took at most {result['idle_sides_cpu_share']:.1%} of a core while another was measured",
        highlight=False,
    )


if __name__ == "__main__":
    use_environment()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
