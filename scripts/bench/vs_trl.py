#!/usr/bin/env python3
"""Time of a complete GRPO step, against TRL's GRPOTrainer with vLLM in its process (vllm_mode="colocate").

A step is 8 prompts x 8 completions of exactly 32 tokens (neither side stops at an end-of-text token, so both compute the same
number), SmolLM2-135M-Instruct in bf16, LoRA of rank 64 on all seven projections with fp32 master weights, one optimizer step.
All of it is timed: the new weights go to vLLM, completions are sampled and scored, log-probabilities, forward, backward,
optimizer, and what a trainer does between two steps. The reward is a hash of the token ids, so every group has reward variance
and neither side can skip work.

Both sides run the `train()` of their public trainer in a separate process, paused between steps. Repeats are interleaved:
one side sleeps while the other is measured (the processor time of the sleeping one is in the result), and its first step after
sleeping is not measured. `trl` is TRL with its defaults, which include gradient checkpointing; `trl_tuned` is TRL without
checkpointing and with freed memory kept as in rankup (`kernels/cpu_memory.py`). Each is compared with the steps of rankup that
were interleaved with it. The changes that vLLM on CPU needs to work with TRL at all are in the result as `trl_side_changes`.

examples:
  scripts/bench/vs_trl.py --json vs_trl.json       the full comparison on two idle cores
  scripts/bench/vs_trl.py --repeats 1              a quick look
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import Result, command_line, markdown, run, seconds_with_spread, summarise
from workers import Turns, Worker

PROMPTS, COMPLETIONS, TOKENS = 8, 8, 32
RANK, ALPHA, LEARNING_RATE = 64, 32, 1e-4
WARM_UPS = 5  # steps before measuring, until a process has allocated its working memory
SIDES = {"rankup": "rankup", "trl": "TRL, its defaults", "trl_tuned": "TRL, tuned"}
PHASES = {"rollout": "rollout", "reward": "reward", "train": "training", "publish": "weights to vLLM", "other": "other"}


def score_by_hash(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """A number in [0, 1) for each completion that depends only on its token ids: distinct completions, distinct rewards."""
    texts = [" ".join(map(str, ids)) for ids in completion_ids]
    digests = [hashlib.blake2b(text.encode(), digest_size=6).digest() for text in texts]
    return [int.from_bytes(digest, "little") / 2**48 for digest in digests]


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="measured steps of each side")
    micro_batch_help = "completions in a forward and backward pass of TRL (default 8)"
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help=micro_batch_help)
    options = parser.parse_args()
    if options.micro_batch < 1 or PROMPTS * COMPLETIONS % options.micro_batch:
        parser.error(f"--micro-batch must divide the {PROMPTS * COMPLETIONS} completions of a step")
    run(options, measure, report)


def measure(options: argparse.Namespace) -> Result:
    """rankup against each of TRL's sides in turn; both of those together would not fit in memory."""
    turns = Turns()
    steps: dict[str, list[Result]] = {name: [] for name in SIDES}
    speedups: dict[str, float] = {}
    about: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder, _side("rankup", folder=Path(folder)) as rankup:
        for name in ("trl", "trl_tuned"):
            settings = {"tuned": name == "trl_tuned", "micro_batch": options.micro_batch}
            with _side(name, folder=Path(folder), **settings) as trl:
                pair = {"rankup": rankup, name: trl}
                measured = turns.interleave(pair, options.repeats, lambda side, pair=pair: _step(pair[side]))
                about |= {side: worker.call("describe") for side, worker in pair.items()}
            ours, theirs = (statistics.median(step["seconds"] for step in measured[side]) for side in pair)
            speedups[name] = theirs / ours
            print(f"{SIDES[name]} {theirs:.1f} s, rankup {ours:.1f} s", flush=True)
            for side, found in measured.items():
                steps[side] += found

    def of_all(key: str) -> dict[str, Result]:
        return {name: summarise([step[key] for step in of_side]) for name, of_side in steps.items()}

    seconds = of_all("seconds")
    return {
        "speedup": speedups["trl"],
        "trl_tuned": {"speedup": speedups["trl_tuned"], "step_seconds": seconds.pop("trl_tuned")},
        "step_seconds": seconds,
        "phases": {
            name: {phase: summarise([step["phases"][phase] for step in of_side]) for phase in PHASES}
            for name, of_side in steps.items()
        },
        "tokens": of_all("tokens"),
        "sampling_logp_difference": of_all("sampling_logp_difference"),
        "peak_memory_gib": {name: about[name].pop("peak_memory_gib") for name in SIDES},
        "trl_side_changes": about["trl"]["changes"],
        "idle_sides_cpu_share": turns.idle_share,
        "settings": about,
    }


def _side(name: str, **options: object) -> Worker:
    """Start a side and warm it up."""
    worker = Worker(SIDES[name], f"vs_trl_sides:{'RankupSide' if name == 'rankup' else 'TrlSide'}", **options)
    for _ in range(WARM_UPS):
        worker.call("step")
    return worker


def _step(worker: Worker) -> Result:
    """One step of a side, after one that is not measured."""
    worker.call("step")
    step: Result = worker.call("step")
    assert step["lengths"] == [TOKENS, TOKENS], "the shortest and the longest completion have the full length"
    assert step["groups_without_variance"] == 0.0, "every group contributes to the gradient"
    step["phases"]["other"] = step["seconds"] - sum(step["phases"].values())
    return step


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """The table, the peak memory, and how quiet the idle sides were."""
    memory = ", ".join(f"{SIDES[name]} {size:.1f}" for name, size in result["peak_memory_gib"].items())
    idle = f"- idle sides used at most {result['idle_sides_cpu_share']:.1%} of a core"
    return "\n".join([table(result), "", f"- peak memory, GiB: {memory}", idle])


def _seconds_and_speed(result: Result) -> dict[str, tuple[Result, str]]:
    """Seconds of a step, and the speed of rankup relative to it, of each side."""
    tuned = result["trl_tuned"]
    return {
        "rankup": (result["step_seconds"]["rankup"], ""),
        "trl": (result["step_seconds"]["trl"], f"{result['speedup']:.2f} ×"),
        "trl_tuned": (tuned["step_seconds"], f"{tuned['speedup']:.2f} ×"),
    }


def table(result: Result) -> str:
    """A row per side: seconds of a step, their spread, speed of rankup relative to it, and the phases."""
    rows = [
        [
            SIDES[name],
            seconds_with_spread(seconds),
            speed,
            *(f"{result['phases'][name][phase]['median']:.2f}" for phase in PHASES),
        ]
        for name, (seconds, speed) in _seconds_and_speed(result).items()
    ]
    return markdown(["side", "seconds a step", "rankup's speed", *PHASES.values()], rows, left=1)


def draw(result: Result, out: Path) -> None:
    """Seconds of a complete step by side, divided into phases."""
    from plots import bars, legend_below, measured, stack

    sides = _seconds_and_speed(result).values()
    texts = [f"{one['median']:.2f} s" + (f"\n{speed} rankup's" if speed else "") for one, speed in sides]
    with measured(out, "A complete step of GRPO", result) as (axes,):
        bars(axes, list(SIDES.values()), [one for one, _ in sides], texts, color="none")
        medians = {name: [result["phases"][side][phase]["median"] for side in SIDES] for phase, name in PHASES.items()}
        stack(axes, medians)
        legend_below(axes)
        axes.set_xlabel("seconds")


if __name__ == "__main__":
    main()
