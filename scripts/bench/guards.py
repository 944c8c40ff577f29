#!/usr/bin/env python3
"""What guards cost: a verdict, and a snapshot of masters and optimizer state (taken every five healthy steps).

`share_of_step` is their time a step over that of a run's steps, whose medians are read from its `metrics.jsonl`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from common import command_line, machine, use_environment, versions, write_json

EXAMPLES = """examples:
  scripts/bench/guards.py runs/quickstart
  scripts/bench/guards.py runs/quickstart --json guards.json
"""


def main() -> None:
    parser = command_line(__doc__, EXAMPLES, repeats=20, what="verdicts and snapshots to time")
    parser.add_argument("run", type=Path, help="a run folder: its adapter's rank and its steps count")
    options = parser.parse_args()
    use_environment()
    import torch

    from rankup.grpo.common.model_files import resolve_model
    from rankup.grpo.common.quiet import quiet_loggers, quiet_stderr
    from rankup.grpo.config import load_config
    from rankup.grpo.guards.guards import Guards
    from rankup.grpo.model.policy import Policy
    from rankup.grpo.run.records import CONFIG_FILE, read_metrics
    from rankup.grpo.update.optimizer import make_optimizer
    from rankup.grpo.update.snapshots import Snapshot
    from rankup.kernels.cpu_memory import keep_freed_memory

    quiet_loggers()
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
    guards, snapshot = Guards(config.guards), Snapshot(policy.masters, optimizer)
    judge = _times(options.repeats, lambda i: guards.judge(i + 1, rows[i % len(rows)]))
    take = _times(options.repeats + 1, snapshot.take)[1:]  # the first allocates
    a_step = statistics.median(judge) + statistics.median(take) / config.guards.snapshot_steps
    result = {
        "what": " ".join((__doc__ or "").split()),
        "machine": machine(),
        "versions": versions(),
        "rank": config.lora.rank,
        "parameters": sum(master.numel() for master in policy.masters),
        "judge_seconds": statistics.median(judge),
        "snapshot_seconds": statistics.median(take),
        "step_seconds": step_seconds,
        "share_of_step": a_step / step_seconds,
    }
    print({name: value for name, value in result.items() if name not in ("what", "machine", "versions")})
    if options.json:
        write_json(options.json, result)


def _times(repeats: int, function: Callable[[int], object]) -> list[float]:
    seconds = []
    for index in range(repeats):
        started = time.perf_counter()
        function(index)
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
