"""From rewards to advantages: how much better a completion was than the others of its group.

A reward of None means that no reward function applied to the completion: it is left out of the statistics and its advantage is
zero. Plain Python numbers in and out; groups are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

STD_EPSILON = 1e-4  # TRL's: keeps a group of nearly equal rewards from exploding


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAdvantages:
    """Of one group: the advantages, its mean and standard deviation of reward, and whether there is anything to learn."""

    advantages: tuple[float, ...]
    mean: float
    std: float
    has_variance: bool


def group_advantages(
    rewards: Sequence[Sequence[float | None]], *, scale_rewards: Literal["group", "batch", "none"]
) -> list[GroupAdvantages]:
    """Advantages of every group of a step: `(r - mean) / (std + 1e-4)` (GRPO, arXiv 2402.03300).

    `mean` is the group's. `scale_rewards` says whose standard deviation divides: the group's, the batch's
    (arXiv 2508.08221), or none (Dr. GRPO, arXiv 2503.20783). Standard deviations are of a sample (n - 1), as in TRL.
    """
    batch_std = _std([r for group in rewards for r in group if r is not None])
    results = []
    for group in rewards:
        known = [r for r in group if r is not None]
        mean, std = _mean(known), _std(known)
        divisor = {"group": std + STD_EPSILON, "batch": batch_std + STD_EPSILON, "none": 1.0}[scale_rewards]
        results.append(
            GroupAdvantages(
                advantages=tuple(0.0 if r is None else (r - mean) / divisor for r in group),
                mean=mean,
                std=std,
                has_variance=bool(known) and max(known) > min(known),
            )
        )
    return results


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
