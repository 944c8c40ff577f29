#!/usr/bin/env python3
"""What guards cost: a decision, and a snapshot of fp32 master weights and optimizer state (taken every five healthy steps).

`share_of_step` is their time per step divided by the median time of a step, read from the `metrics.jsonl` of a run.

examples:
  scripts/bench/guards.py runs/quickstart
  scripts/bench/guards.py runs/quickstart --json guards.json
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from pathlib import Path

from common import Result, command_line, run


def main() -> None:
    """Run the benchmark, print the figures and write the JSON file."""
    parser = command_line(__doc__, repeats=20, what="decisions and snapshots to time")
    parser.add_argument("run", type=Path, help="a run folder, for the rank of its adapter and the time of its steps")
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Time decisions on the metrics of the run, and snapshots of an adapter of its rank."""
    import torch

    from rankup.grpo.common.model_files import resolve_model
    from rankup.grpo.common.quiet import quiet_stderr
    from rankup.grpo.config import load_config
    from rankup.grpo.guards.guards import Guards
    from rankup.grpo.model.policy import Policy
    from rankup.grpo.run.records import CONFIG_FILE, read_metrics
    from rankup.grpo.update.optimizer import make_optimizer
    from rankup.grpo.update.snapshots import Snapshots
    from rankup.kernels.cpu_memory import keep_freed_memory

    keep_freed_memory()
    config = load_config(options.run / CONFIG_FILE)
    rows = [row for row in read_metrics(options.run) if "time/train" in row]
    phases = ("rollout", "reward", "train", "publish")
    step_seconds = statistics.median(sum(row[f"time/{phase}"] for phase in phases) for row in rows)
    with quiet_stderr():
        policy = Policy(resolve_model(config.model.name), lora=config.lora, dtype=config.model.dtype)
    optimizer = make_optimizer(policy.master_roles, config.optim)
    for master in policy.masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    snapshots = Snapshots(policy.masters, optimizer)
    guards, steps = Guards(config.guards, snapshots), iter(range(options.repeats))

    def judge() -> None:
        step = next(steps)
        guards.inspect(step, rows[step % len(rows)])

    judge_seconds = statistics.median(timeit.repeat(judge, number=1, repeat=options.repeats))
    snapshots.take("step", 0)  # allocates
    snapshot_seconds = statistics.median(timeit.repeat(lambda: snapshots.take("step", 1), number=1, repeat=options.repeats))
    return {
        "rank": config.lora.rank,
        "parameters": sum(master.numel() for master in policy.masters),
        "judge_seconds": judge_seconds,
        "snapshot_seconds": snapshot_seconds,
        "step_seconds": step_seconds,
        "share_of_step": (judge_seconds + snapshot_seconds / config.guards.snapshot_steps) / step_seconds,
    }


def report(result: Result) -> str:
    """The figures, one a line."""
    return "\n".join(f"- {name}: {value:g}" for name, value in result.items() if isinstance(value, int | float))


if __name__ == "__main__":
    main()
