"""A step's batch: groups sampled and scored, their advantages, and which of them are trained on.

    batch = collect_batch(engine, scorer, sampler, config, step=3)
    learner.update(batch.weighted, step=3, observed=batch.metrics)

With dynamic sampling (`algorithm.max_resampling_rounds`, DAPO) further prompts are drawn while groups without variance leave
too few to learn from. Every group that was sampled counts in the rewards that are reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ...rewards.runner import Scorer
from ...rollout.engine import RolloutEngine
from ..algorithm.advantages import GroupAdvantages, group_advantages, normalized_sums, soft_overlong_penalty
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.sampler import PromptSampler
from ..model.packing import WeightedGroup
from .collect import Collected, ScoredGroup, collect, together
from .step_metrics import completion_metrics, reward_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a step's rollouts gave.

    Attributes:
        collected: all groups that were sampled, with the seconds that it took.
        advantages: one entry a group of `collected`.
        weighted: the groups to train on.
        metrics: of all groups, under TRL's names.
    """

    collected: Collected
    advantages: list[GroupAdvantages]
    weighted: list[WeightedGroup]
    metrics: dict[str, float]


def collect_batch(
    engine: RolloutEngine,
    scorer: Scorer,
    sampler: PromptSampler,
    config: GRPOConfig,
    *,
    step: int,
    world: World = SINGLE_PROCESS,
) -> Batch:
    """Sample, score and weigh the groups of a step (from 0); the same for the same step, seed and policy.

    Each worker samples its share of every round; advantages are computed over all groups, other workers' as metadata.
    """
    wanted, rounds = config.optim.prompts_per_step, config.algorithm.max_resampling_rounds
    collected = _round(engine, scorer, sampler, config, step=step, number=0, world=world)
    advantages = weigh(collected.groups, config)
    number = 0
    while number < rounds and sum(a.has_variance for a in advantages) < wanted:
        number += 1
        more = _round(engine, scorer, sampler, config, step=step, number=number, world=world)
        collected = Collected(
            groups=[*collected.groups, *more.groups],
            rollout_seconds=collected.rollout_seconds + more.rollout_seconds,
            reward_seconds=collected.reward_seconds + more.reward_seconds,
        )
        advantages = weigh(collected.groups, config)
    metrics = {**reward_metrics(collected.groups, advantages, scorer), **completion_metrics(collected.groups)}
    if config.algorithm.soft_overlong_tokens:
        penalties = [p for g in collected.groups for p in _penalties(g, config)]
        metrics["overlong_penalty"] = sum(penalties) / len(penalties)
    if rounds:
        metrics["resampling_rounds"] = float(number)
    return Batch(
        collected=collected,
        advantages=advantages,
        weighted=_to_train_on(collected.groups, advantages, wanted=wanted, choose=number > 0),
        metrics=metrics,
    )


def weigh(groups: Sequence[ScoredGroup], config: GRPOConfig) -> list[GroupAdvantages]:
    """The groups' advantages, soft overlong penalties taken off their rewards."""
    rewards = [
        [None if r is None else r - penalty for r, penalty in zip(g.scores.total, _penalties(g, config), strict=True)]
        for g in groups
    ]
    algorithm = config.algorithm
    weighed = group_advantages(rewards, estimator=algorithm.advantage_estimator, scale_rewards=algorithm.scale_rewards)
    if config.rewards.multi_objective_aggregation == "sum_then_normalize":
        return weighed
    sums = normalized_sums([list(g.scores.by_function.values()) for g in groups], groups[0].scores.weights)
    normalised = group_advantages(sums, estimator="group", scale_rewards="batch")
    # What is reported of the rewards is of the rewards themselves.
    return [dataclasses.replace(n, mean=w.mean, std=w.std) for n, w in zip(normalised, weighed, strict=True)]


def _penalties(group: ScoredGroup, config: GRPOConfig) -> list[float]:
    return [
        soft_overlong_penalty(
            completion.num_tokens,
            max_completion_length=config.rollout.max_completion_length,
            soft_tokens=config.algorithm.soft_overlong_tokens,
        )
        for completion in group.group.completions
    ]


def _round(
    engine: RolloutEngine,
    scorer: Scorer,
    sampler: PromptSampler,
    config: GRPOConfig,
    *,
    step: int,
    number: int,
    world: World,
) -> Collected:
    """The step's own prompts (number 0), or those of a further round: this worker's share in full, the others' as metadata."""
    rows = sampler.batch(step) if number == 0 else sampler.further_batch(step, number)
    share = world.shard(len(rows))
    own = collect(
        engine,
        scorer,
        rows[share],
        config.rollout,
        seed=(config.seed, step),
        first_index=number * config.optim.prompts_per_step + share.start,
        trainer_state={"global_step": step, "max_steps": config.optim.max_steps},
    )
    return together(own, rows, world)


def _to_train_on(
    groups: Sequence[ScoredGroup], advantages: Sequence[GroupAdvantages], *, wanted: int, choose: bool
) -> list[WeightedGroup]:
    """All groups (the learner leaves out what has no gradient); after resampling the first `wanted` with variance."""
    weighted = [
        WeightedGroup(group=dataclasses.replace(g.group, index=place), advantages=a.advantages, is_own=g.is_own)
        for place, (g, a) in enumerate(zip(groups, advantages, strict=True))
        if a.has_variance or not choose
    ]
    return weighted[:wanted] if choose else weighted
