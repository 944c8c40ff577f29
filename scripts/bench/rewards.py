#!/usr/bin/env python3
"""What rewards in processes cost, and what they save.

    overhead    1,024 completions (128 prompts of 8) and a reward function that does nothing: inline, and in processes
    step        steps of the quick start with a reward that sleeps 2 s per completion, in 8 processes: time of sampling and
                scoring, divided by that of sampling alone plus one call

examples:
  scripts/bench/rewards.py overhead
  scripts/bench/rewards.py step --repeats 3 --json step.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from common import QUICKSTART, Result, command_line, interleave, run, summarise

GROUPS, GENERATIONS, SLEEP = 128, 8, 2.0


def nothing(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward function that costs nothing."""
    return [0.0] * len(completions)


def sleeps(completions: list[Any], **kwargs: Any) -> list[float]:
    """A slow one, whose rewards differ."""
    time.sleep(SLEEP * len(completions))
    return [float(index % 2) for index in range(len(completions))]


def main() -> None:
    """Run one of the two, print the figures and write the JSON file."""
    parser = command_line(__doc__, repeats=20, what="how often everything is scored, or steps")
    parser.add_argument("what", choices=["overhead", "step"])
    options = parser.parse_args()
    run(options, overhead if options.what == "overhead" else step, report)


def overhead(options: argparse.Namespace) -> Result:
    """Milliseconds from the first submit to the last result."""
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
    inline, process = RewardsConfig(), RewardsConfig(isolation="process")
    with closing(Scorer(inline, nothing)) as here, closing(Scorer(process, nothing)) as elsewhere:
        scorers = {"inline": here, "process": elsewhere}

        def score_all(name: str) -> float:
            started = time.perf_counter()
            for pending in [scorers[name].submit(group) for group in groups]:
                pending.result()
            return 1000 * (time.perf_counter() - started)

        interleave(scorers, 2, score_all)  # starts the processes
        milliseconds = interleave(scorers, options.repeats, score_all)
    figures = {name: summarise(values) for name, values in milliseconds.items()}
    return {"what": "overhead", "milliseconds": figures, "completions": GROUPS * GENERATIONS}


def step(options: argparse.Namespace) -> Result:
    """Steps of 8 prompts with the slow reward, and with the trivial one, which shows the time of sampling alone."""
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:
        sampling, with_reward = (
            summarise(_train(function, options.repeats + 1, Path(folder) / function.__name__)[1:])
            for function in (nothing, sleeps)
        )
    call = SLEEP * GENERATIONS
    ratio = with_reward["median"] / (sampling["median"] + call)
    return {
        "what": "step",
        "seconds": {"sampling": sampling, "with the reward": with_reward},
        "call_seconds": call,
        "ratio": ratio,
    }


def _train(function: Callable[..., list[float]], steps: int, folder: Path) -> list[float]:
    """Seconds of sampling and scoring in each step of a run."""
    from rankup import GRPOTrainer
    from rankup.grpo.config import load_config
    from rankup.grpo.run.records import read_metrics

    overrides = [
        f"optim.max_steps={steps}",
        "optim.prompts_per_step=8",
        "logging.eval_before=false",
        "data.eval=null",
        "rewards.isolation=process",
        "rewards.num_workers=8",
        f"logging.output_dir={folder}",
    ]
    GRPOTrainer(reward_funcs=function, args=load_config(QUICKSTART, overrides)).train()
    return [row["time/rollout"] + row["time/reward"] for row in read_metrics(folder) if "time/rollout" in row]


def report(result: Result) -> str:
    """Median and spread of each kind, and the ratio of `step`."""
    key, unit = ("milliseconds", "ms") if "milliseconds" in result else ("seconds", "s")
    lines = [
        f"- {name}: {values['median']:.2f} {unit} ({values['min']:.2f} to {values['max']:.2f})"
        for name, values in result[key].items()
    ]
    if "ratio" in result:
        call = f"one call ({result['call_seconds']:g} s)"
        lines.append(f"- with the reward: {result['ratio']:.3f} x the time of sampling and {call}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
