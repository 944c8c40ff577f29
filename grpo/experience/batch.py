"""A step's batch: groups sampled and scored, with their advantages, and which of them are trained on.

    batch = collect_batch(engine, scorer, sampler, config, functions=UserFunctions.load(config), step=3)
    learner.backward(batch.trained)

Dynamic sampling (`algorithm.max_resampling_rounds`, DAPO) draws further prompts while too few groups have variance and pass the
user's filter. Every sampled group counts in the reported rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rewards.runner import Scorer
from ...rollout.engine import request_seed
from ...rollout.protocol import Engine
from ..algorithm.advantages import group_advantages, normalized_sums, soft_overlong_penalty
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.groups import Group
from ..data.prompts import Prompt
from ..data.sampler import PromptSampler
from ..episodes.groups import Episodes
from .collect import Collected, collect
from .scoring import with_same_functions
from .step_metrics import completion_metrics, has_reward, reward_metrics
from .user_functions import NO_FUNCTIONS, UserFunctions, filtered, user_advantages


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

    def without_experts(self) -> Batch:
        """The batch without the experts that the engine chose: hundreds of bytes a token, for which callbacks have no use."""
        groups, trained = ([group.without_experts() for group in some] for some in (self.groups, self.trained))
        return dataclasses.replace(self, groups=groups, trained=trained)


def collect_batch(
    engine: Engine,
    scorer: Scorer,
    sampler: PromptSampler,
    config: GRPOConfig,
    *,
    functions: UserFunctions,
    step: int,
    episodes: Episodes | None = None,
    trainer_state: Mapping[str, Any] | None = None,
    world: World = SINGLE_PROCESS,
) -> Batch:
    """Sample and score the groups of a step and compute their advantages; the same for the same step, seed and policy.

    Each worker samples its shard of every round. Advantages are computed from the groups of all workers.

    Args:
        functions: those of `config`, loaded.
        episodes: None: a completion is one answer.
        trainer_state: of the reward functions. None: only the step.

    Raises:
        ValueError: a user's function returned something else than it should.
    """
    wanted, max_rounds = config.optim.prompts_per_step, config.algorithm.max_resampling_rounds

    def collect_round(number: int) -> Collected:
        prompts = _prompts(sampler, step, number, world)
        return collect(
            engine,
            scorer,
            prompts,
            config.rollout,
            episodes=episodes,
            seeds=[request_seed(config.seed, step, number * wanted + index) for index in range(len(prompts))],
            trainer_state=trainer_state or {"global_step": step, "max_steps": config.optim.max_steps},
            world=world,
        )

    def groups_of(rounds: Sequence[Collected]) -> list[Group]:
        """All groups, with their advantages and the decision of the user's filter."""
        scored = with_same_functions([group for one in rounds for group in one.groups])
        groups = with_advantages(scored, config, functions, world)
        return groups if functions.group_filter is None else filtered(functions.group_filter, groups, world)

    rounds = [collect_round(0)]
    groups = groups_of(rounds)
    while len(rounds) <= max_rounds and _lacks_variance(groups, wanted):
        rounds.append(collect_round(len(rounds)))
        groups = groups_of(rounds)
    passing = [group for group in groups if group.passes_filter]
    return Batch(
        groups=groups,
        # Without resampling all that pass: the learner leaves out groups without a gradient.
        trained=passing if len(rounds) == 1 else [group for group in passing if group.has_variance][:wanted],
        metrics=_metrics(groups, scorer.names, config, rounds=len(rounds)),
        rollout_seconds=sum(one.rollout_seconds for one in rounds),
        reward_seconds=sum(one.reward_seconds for one in rounds),
    )


def _prompts(sampler: PromptSampler, step: int, number: int, world: World) -> Sequence[Prompt]:
    """The step's prompts (number 0), or those of a resampling round."""
    if number > 0:
        return sampler.further_batch(step, number)
    # A user's sampler could differ between workers: the main process decides.
    return [sampler.rows[index] for index in world.broadcast_from_main(lambda: sampler.indices(step))]


def _lacks_variance(groups: Sequence[Group], wanted: int) -> bool:
    """Whether too few groups can be trained on. Not in an outage: more prompts would have no reward either."""
    usable = sum(group.has_variance and group.passes_filter for group in groups)
    return usable < wanted and any(map(has_reward, groups))


def with_advantages(
    groups: Sequence[Group],
    config: GRPOConfig,
    functions: UserFunctions = NO_FUNCTIONS,
    world: World = SINGLE_PROCESS,
) -> list[Group]:
    """The groups with their advantages: those of the user's function, else of the rewards less soft overlong penalties.

    Raises:
        ValueError: the user's function did not return one finite number for each completion.
    """
    algorithm = config.algorithm
    assert (functions.advantages is None) == (algorithm.custom_advantages is None), "the functions are of another configuration"
    rewards = [
        [None if r is None else r - penalty for r, penalty in zip(g.scores.total, _overlong_penalties(g, config), strict=True)]
        for g in groups
    ]
    estimator = str(algorithm.advantage_estimator) if functions.advantages is None else "group"
    of_rewards = group_advantages(rewards, estimator=estimator, scale_rewards=algorithm.scale_rewards)
    computed = of_rewards
    if functions.advantages is not None:
        rows = user_advantages(functions.advantages, groups, world)
        computed = [
            dataclasses.replace(one, advantages=row, has_variance=any(row)) for one, row in zip(of_rewards, rows, strict=True)
        ]
    elif config.rewards.multi_objective_aggregation == "normalize_then_sum":
        sums = normalized_sums([list(g.scores.by_function.values()) for g in groups], groups[0].scores.weights)
        computed = group_advantages(sums, estimator="group", scale_rewards="batch")
    return [
        dataclasses.replace(
            group, advantages=one.advantages, has_variance=one.has_variance, reward_std=of_reward.std
        )
        for group, one, of_reward in zip(groups, computed, of_rewards, strict=True)
    ]


def _metrics(groups: Sequence[Group], function_names: Sequence[str], config: GRPOConfig, *, rounds: int) -> dict[str, float]:
    """Of all groups that were sampled."""
    algorithm = config.algorithm
    metrics = {**reward_metrics(groups, function_names), **completion_metrics(groups)}
    if algorithm.soft_overlong_tokens:
        penalties = [penalty for group in groups for penalty in _overlong_penalties(group.without_void(), config)]
        metrics["overlong_penalty"] = sum(penalties) / max(1, len(penalties))
    if algorithm.group_filter is not None:
        metrics["filtered_ratio"] = sum(not group.passes_filter for group in groups) / len(groups)
    if algorithm.max_resampling_rounds:
        metrics["resampling_rounds"] = float(rounds - 1)
    return metrics


def _overlong_penalties(group: Group, config: GRPOConfig) -> list[float]:
    return [
        soft_overlong_penalty(
            completion.num_tokens,
            max_completion_length=config.rollout.max_completion_length,
            soft_tokens=config.algorithm.soft_overlong_tokens,
        )
        for completion in group.completions
    ]
