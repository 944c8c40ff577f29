#!/usr/bin/env python3
"""What rewards in processes cost, and what they save.

    overhead    1,024 completions (128 prompts of 8) and a function that does nothing: inline, and in processes
    step        steps of the quick start whose reward sleeps 2 s a completion: seconds of the step over those of sampling alone
                and one call, in 8 processes
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from common import ROOT, command_line, machine, summarise, use_environment, versions, write_json

EXAMPLES = """examples:
  scripts/bench/rewards.py overhead
  scripts/bench/rewards.py step --repeats 3 --json step.json
"""
GROUPS, GENERATIONS, SLEEP = 128, 8, 2.0


def nothing(completions: list[Any], **kwargs: Any) -> list[float]:
    """A trivial reward."""
    return [0.0] * len(completions)


def sleeps(completions: list[Any], **kwargs: Any) -> list[float]:
    """A slow one, whose rewards differ."""
    time.sleep(SLEEP * len(completions))
    return [float(index % 2) for index in range(len(completions))]


def main() -> None:
    parser = command_line(__doc__, EXAMPLES, repeats=20, what="times that everything is scored, or steps")
    parser.add_argument("what", choices=["overhead", "step"])
    options = parser.parse_args()
    use_environment()
    result = overhead(options) if options.what == "overhead" else step(options)
    result |= {"what": options.what, "machine": machine(), "versions": versions()}
    if options.json is not None:
        write_json(options.json, result)


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds from the first submit to the last result, repeats interleaved."""
    from rankup.rewards import Inputs, RewardsConfig, Scorer

    text = "The answer is forty-two, as anyone can see. " * 6
    groups = [
        Inputs(
            prompts=[f"What is {index} + {index}?"] * GENERATIONS,
            completions=[text] * GENERATIONS,
            completion_ids=[list(range(64))] * GENERATIONS,
            columns={"answer": [2 * index] * GENERATIONS},
            trainer_state={"global_step": 1, "max_steps": 2},
        )
        for index in range(GROUPS)
    ]
    milliseconds: dict[str, list[float]] = {"inline": [], "process": []}
    inline, process = RewardsConfig(), RewardsConfig(isolation="process")
    with closing(Scorer(inline, nothing)) as here, closing(Scorer(process, nothing)) as elsewhere:
        scorers = {"inline": here, "process": elsewhere}
        for repeat in range(options.repeats + 2):
            for name, scorer in scorers.items():
                started = time.perf_counter()
                for pending in [scorer.submit(group) for group in groups]:
                    pending.result()
                if repeat >= 2:  # the processes have started, and buffers are warm
                    milliseconds[name].append(1000 * (time.perf_counter() - started))
    result = {name: summarise(values) for name, values in milliseconds.items()}
    for name, summary in result.items():
        print(f"{name:8} {summary['median']:.1f} ms ({summary['min']:.1f} to {summary['max']:.1f})")
    return {"milliseconds": result, "completions": GROUPS * GENERATIONS}


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of 8 prompts with the slow reward; sampling alone is measured by the same steps' own clock with a trivial one."""
    from rankup import GRPOTrainer
    from rankup.grpo.common.quiet import quiet_loggers
    from rankup.grpo.config import load_config
    from rankup.grpo.run.records import read_metrics

    quiet_loggers()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, function in (("sampling", nothing), ("with the reward", sleeps)):
            overrides = [
                f"optim.max_steps={options.repeats + 1}",
                "optim.prompts_per_step=8",
                "logging.eval_before=false",
                "data.eval=null",
                "rewards.isolation=process",
                "rewards.num_workers=8",
                f"logging.output_dir={folder}/{name.split()[0]}",
            ]
            config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
            GRPOTrainer(reward_funcs=function, args=config).train()
            rows = [row for row in read_metrics(Path(config.logging.output_dir)) if "time/rollout" in row][1:]
            seconds[name] = [row["time/rollout"] + row["time/reward"] for row in rows]
    result = {name: summarise(values) for name, values in seconds.items()}
    call = SLEEP * GENERATIONS
    bound = result["sampling"]["median"] + call
    ratio = result["with the reward"]["median"] / bound
    print(f"sampling {result['sampling']['median']:.2f} s, with the reward {result['with the reward']['median']:.2f} s: "
          f"{ratio:.3f} of sampling and one call ({call:g} s)")
    return {"seconds": result, "call_seconds": call, "ratio": ratio}


if __name__ == "__main__":
    main()
