"""From rewards to advantages: how much better a completion was than its baseline.

    advantages = group_advantages(rewards, estimator="group", scale_rewards="batch")

A reward of None means that no reward function applied to the completion: it is left out of the statistics and its advantage is
zero. Plain Python numbers: groups are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

EPSILON = 1e-4  # TRL's: keeps a group of nearly equal rewards from exploding

Rewards = Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAdvantages:
    """One group's advantages, the standard deviation of its rewards, and whether its rewards differ."""

    advantages: tuple[float, ...]
    std: float
    has_variance: bool


def group_baseline(group: Sequence[float], _batch: Sequence[float]) -> list[float]:
    """`r - mean of the group` (GRPO, arXiv 2402.03300)."""
    mean = _mean(group)
    return [r - mean for r in group]


def leave_one_out_baseline(group: Sequence[float], _batch: Sequence[float]) -> list[float]:
    """`r - mean of the group's other completions` (RLOO, arXiv 2402.14740); zero in a group of one."""
    if len(group) < 2:
        return [0.0] * len(group)
    total = math.fsum(group)
    return [r - (total - r) / (len(group) - 1) for r in group]


def batch_baseline(group: Sequence[float], batch: Sequence[float]) -> list[float]:
    """`r - mean of the batch` (REINFORCE++, arXiv 2501.03262; its paper divides by the batch's standard deviation)."""
    mean = _mean(batch)
    return [r - mean for r in group]


def relative_to_mean(group: Sequence[float], _batch: Sequence[float]) -> list[float]:
    """`(r - mean) / (mean + 1e-4)` of the group (MaxRL, arXiv 2602.02710): rare successes get the largest weight.

    Raises:
        ValueError: a reward is negative, so that the mean is no success rate.
    """
    if group and min(group) < 0:
        raise ValueError(
            f"algorithm.advantage_estimator maxrl reads rewards as success rates, at least 0 (got {min(group):g}): "
            "shift the rewards, or take another estimator"
        )
    mean = _mean(group)
    return [(r - mean) / (mean + EPSILON) for r in group]


ESTIMATORS: dict[str, Callable[[Sequence[float], Sequence[float]], list[float]]] = {
    "group": group_baseline,
    "rloo": leave_one_out_baseline,
    "reinforce_pp": batch_baseline,
    "maxrl": relative_to_mean,
}


def group_advantages(
    rewards: Sequence[Rewards], *, estimator: str = "group", scale_rewards: Literal["group", "batch", "none"]
) -> list[GroupAdvantages]:
    """Advantages of every group of a step.

    Args:
        rewards: one for each completion, by group.
        estimator: a key of `ESTIMATORS`.
        scale_rewards: whose standard deviation (plus 1e-4) divides: the group's (GRPO), the batch's (arXiv 2508.08221), or
            none (Dr. GRPO, arXiv 2503.20783). Standard deviations are of a sample (n - 1), as in TRL.

    Raises:
        ValueError: the estimator does not accept these rewards.
    """
    batch = [r for group in rewards for r in group if r is not None]
    batch_std = _std(batch)
    results = []
    for group in rewards:
        known = [r for r in group if r is not None]
        std, has_variance = _std(known), bool(known) and max(known) > min(known)
        divisor = {"group": std + EPSILON, "batch": batch_std + EPSILON, "none": 1.0}[scale_rewards]
        if has_variance or estimator == "reinforce_pp":
            values = iter(ESTIMATORS[estimator](known, batch))
        else:
            values = iter([0.0] * len(known))  # exact: rounding must not give equal rewards an advantage
        results.append(
            GroupAdvantages(
                advantages=tuple(0.0 if r is None else next(values) / divisor for r in group),
                std=std,
                has_variance=has_variance,
            )
        )
    return results


def normalized_sums(rewards: Sequence[Sequence[Rewards]], weights: Sequence[float]) -> list[Rewards]:
    """Sums of rewards normalised for each function separately (GDPO, arXiv 2601.05242), so that none dominates.

    Of each group and function: `(r - mean of the group) / (standard deviation of the group + 1e-4)`, times the function's
    weight. Their sum over the functions is still to be divided by the batch's standard deviation: `group_advantages` with
    `scale_rewards="batch"`. Its mean is 0 in each group already, and so in the batch.

    Args:
        rewards: one for each completion, by group and then by function.
        weights: one for each function.
    """
    return [_normalized_sum(group, weights) for group in rewards]


def _normalized_sum(group: Sequence[Rewards], weights: Sequence[float]) -> Rewards:
    columns = []
    for rewards, weight in zip(group, weights, strict=True):
        known = [r for r in rewards if r is not None]
        mean, divisor = _mean(known), _std(known) + EPSILON
        is_flat = not known or max(known) == min(known)  # exact: rounding must not give equal rewards an advantage
        columns.append([None if r is None else 0.0 if is_flat else weight * (r - mean) / divisor for r in rewards])
    rows = [[r for r in row if r is not None] for row in zip(*columns, strict=True)]
    return [math.fsum(row) if row else None for row in rows]


def soft_overlong_penalty(length: int, *, max_completion_length: int, soft_tokens: int) -> float:
    """The penalty of a completion of `length` tokens: 0 up to `max_completion_length - soft_tokens`, then linearly up to 1.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), as a number to subtract from the reward.
    """
    if soft_tokens == 0:
        return 0.0
    return min(1.0, max(0.0, (length - (max_completion_length - soft_tokens)) / soft_tokens))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
