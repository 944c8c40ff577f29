"""Completions of the evaluation data, greedy by default, and their rewards.

    evaluation = evaluate(session.engine, scorer, eval_prompts, config, step=20)
    evaluation.mean_reward, evaluation.failures
    evaluation.metrics()            # {"eval_reward": 0.4, "eval_rewards/format/mean": 0.9, "eval_easy_reward": 0.7, ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rewards.runner import Scorer
from ...rollout.engine import request_seed
from ...rollout.protocol import Engine
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.groups import Group
from ..data.prompts import Prompt
from ..episodes.groups import Episodes
from ..guards.evaluations import Rewards, mean_reward
from .collect import collect
from .episode_metrics import episode_metrics, void_failures
from .step_metrics import completion_metrics, failures, scored_shares

EVALUATION = -1
"""In the place of a step, in the seeds of an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scored completions of the evaluation data, the same in every worker.

    Attributes:
        groups: one for each prompt, in the order of the data; remote ones as metadata.
        seconds: time that sampling and scoring took.
    """

    groups: list[Group]
    seconds: float

    @property
    def rewards(self) -> Rewards:
        """In the order of the evaluation data."""
        return [reward for group in self.groups for reward in group.scores.total]

    @property
    def failures(self) -> dict[str, list[str]]:
        """Why functions failed on completions, by function."""
        return failures(self.groups)

    @property
    def is_complete(self) -> bool:
        """Whether its rewards say something about the policy: no function failed, and no episode is void."""
        return not self.failures and not void_failures(self.groups)

    @property
    def scored_shares(self) -> dict[str, float]:
        """The share of the completions that each function with a weight scored, by its name."""
        return scored_shares(self.groups)

    @property
    def mean_reward(self) -> float:
        """Mean over the prompts that have a reward; NaN if none has."""
        return mean_reward(self.rewards)

    def metrics(self) -> dict[str, float]:
        """Metrics by TRL's names with the prefix `eval_`; the rewards also of each named set, with `eval_<set>_`.

        A mean is NaN if there is nothing to average.
        """
        completions = completion_metrics(self.groups)
        metrics = {
            **_mean_rewards(self.groups, prefix="eval_"),
            "eval_completions/mean_length": completions["completions/mean_length"],
            "eval_completions/clipped_ratio": completions["completions/clipped_ratio"],
            "eval_runtime": self.seconds,
            "eval_samples_per_second": sum(len(group.completions) for group in self.groups) / self.seconds,
            **_spread(self.groups),
            **{f"eval_{name}": value for name, value in episode_metrics(self.groups).items()},
        }
        for name in dict.fromkeys(group.prompt.eval_set for group in self.groups):
            if name is not None:
                of_set = [group for group in self.groups if group.prompt.eval_set == name]
                metrics |= _mean_rewards(of_set, prefix=f"eval_{name}_")
        return metrics


def evaluate(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    *,
    step: int,
    episodes: Episodes | None = None,
    trainer_state: Mapping[str, Any] | None = None,
    use_adapter: bool = True,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """Sample completions of each prompt, with or without the adapter, and score them: one greedy one, or as many as
    `logging.num_generations_eval` says. `step`: updates done. `trainer_state`: of the reward functions; None: only the step.

    Each worker takes its shard of the prompts; all get the complete evaluation.
    """
    started, count = time.perf_counter(), config.logging.num_generations_eval
    groups = collect(
        engine,
        scorer,
        prompts,
        config.rollout.greedy() if count is None else config.rollout.as_in_training(count),
        episodes=episodes,
        # The same in every evaluation: what differs between two of them is the policy.
        seeds=[request_seed(config.seed, EVALUATION, index) for index in range(len(prompts))],
        trainer_state=trainer_state or {"global_step": step, "max_steps": config.optim.max_steps},
        use_adapter=use_adapter,
        world=world,
    ).groups
    return Evaluation(groups=groups, seconds=time.perf_counter() - started)


def _spread(groups: Sequence[Group]) -> dict[str, float]:
    """The standard deviation of the rewards within a prompt's completions, if there are several."""
    rewards = [[reward for reward in group.scores.total if reward is not None] for group in groups]
    spreads = [statistics.stdev(known) for known in rewards if len(known) > 1]
    if not spreads:
        return {}
    return {
        "eval_reward_std": statistics.fmean(spreads),
        "eval_frac_reward_zero_std": statistics.fmean(float(spread == 0) for spread in spreads),
    }


def _mean_rewards(groups: Sequence[Group], *, prefix: str) -> dict[str, float]:
    """The mean of the rewards, and of those of each function."""
    metrics = {f"{prefix}reward": mean_reward([reward for group in groups for reward in group.scores.total])}
    for name in groups[0].scores.by_function:
        rewards = [reward for group in groups for reward in group.scores.by_function[name]]
        metrics[f"{prefix}rewards/{name}/mean"] = mean_reward(rewards)
    return metrics
