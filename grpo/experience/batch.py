"""A step's batch: groups sampled and scored, with their advantages, and which of them are trained on.

    batch = collect_batch(engine, scorer, sampler, config, step=3)
    learner.backward(batch.trained)

Dynamic sampling (`algorithm.max_resampling_rounds`, DAPO) draws further prompts while too few groups have variance. Every
sampled group counts in the reported rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ...rewards.runner import Scorer
from ...rollout.engine import request_seed
from ...rollout.protocol import Engine
from ..algorithm.advantages import group_advantages, normalized_sums, soft_overlong_penalty
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.groups import Group
from ..data.sampler import PromptSampler
from .collect import Collected, collect
from .step_metrics import completion_metrics, reward_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rollouts of a step.

    Attributes:
        groups: all groups that were sampled, with advantages; remote ones as metadata.
        trained: the groups to train on.
        metrics: of all groups, by TRL's names.
        rollout_seconds, reward_seconds: time that sampling and scoring took.
    """

    groups: list[Group]
    trained: list[Group]
    metrics: dict[str, float]
    rollout_seconds: float
    reward_seconds: float


def collect_batch(
    engine: Engine,
    scorer: Scorer,
    sampler: PromptSampler,
    config: GRPOConfig,
    *,
    step: int,
    world: World = SINGLE_PROCESS,
) -> Batch:
    """Sample and score the groups of a step and compute their advantages; the same for the same step, seed and policy.

    Each worker samples its shard of every round. Advantages are computed from the groups of all workers.
    """
    wanted, max_rounds = config.optim.prompts_per_step, config.algorithm.max_resampling_rounds

    def collect_round(number: int) -> Collected:
        """The step's prompts (number 0), or those of a resampling round."""
        prompts = sampler.batch(step) if number == 0 else sampler.further_batch(step, number)
        return collect(
            engine,
            scorer,
            prompts,
            config.rollout,
            seeds=[request_seed(config.seed, step, number * wanted + index) for index in range(len(prompts))],
            trainer_state={"global_step": step, "max_steps": config.optim.max_steps},
            world=world,
        )

    rounds = [collect_round(0)]
    groups = with_advantages(rounds[0].groups, config)
    while len(rounds) <= max_rounds and sum(group.has_variance for group in groups) < wanted:
        rounds.append(collect_round(len(rounds)))
        groups = with_advantages([group for one in rounds for group in one.groups], config)
    metrics = {**reward_metrics(groups, scorer.names), **completion_metrics(groups)}
    if config.algorithm.soft_overlong_tokens:
        penalties = [penalty for group in groups for penalty in _overlong_penalties(group, config)]
        metrics["overlong_penalty"] = sum(penalties) / len(penalties)
    if max_rounds:
        metrics["resampling_rounds"] = float(len(rounds) - 1)
    return Batch(
        groups=groups,
        # Without resampling all of them: the learner leaves out groups without a gradient.
        trained=groups if len(rounds) == 1 else [group for group in groups if group.has_variance][:wanted],
        metrics=metrics,
        rollout_seconds=sum(one.rollout_seconds for one in rounds),
        reward_seconds=sum(one.reward_seconds for one in rounds),
    )


def with_advantages(groups: Sequence[Group], config: GRPOConfig) -> list[Group]:
    """The groups with their advantages. Soft overlong penalties are subtracted from the rewards first."""
    rewards = [
        [None if r is None else r - penalty for r, penalty in zip(g.scores.total, _overlong_penalties(g, config), strict=True)]
        for g in groups
    ]
    algorithm = config.algorithm
    of_rewards = group_advantages(rewards, estimator=algorithm.advantage_estimator, scale_rewards=algorithm.scale_rewards)
    computed = of_rewards
    if config.rewards.multi_objective_aggregation == "normalize_then_sum":
        sums = normalized_sums([list(g.scores.by_function.values()) for g in groups], groups[0].scores.weights)
        computed = group_advantages(sums, estimator="group", scale_rewards="batch")
    return [
        dataclasses.replace(
            group, advantages=one.advantages, has_variance=one.has_variance, reward_std=of_reward.std
        )
        for group, one, of_reward in zip(groups, computed, of_rewards, strict=True)
    ]


def _overlong_penalties(group: Group, config: GRPOConfig) -> list[float]:
    return [
        soft_overlong_penalty(
            completion.num_tokens,
            max_completion_length=config.rollout.max_completion_length,
            soft_tokens=config.algorithm.soft_overlong_tokens,
        )
        for completion in group.completions
    ]
