"""Evaluations of one run: how they began, the best of them, and how much of what was gained is lost again.

    evaluations = Evaluations()
    evaluations.add(rewards_before)
    evaluations.add(rewards_at_step_20)
    evaluations.lost(rewards_now, standard_errors=2)     # 0.4: of what was gained, 40 % are lost again beyond noise

An evaluation is greedy and on the same prompts each time, so two of them are compared prompt by prompt: most prompts have the
same reward in both, and the difference of the means is known far better than either mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Rewards = Sequence[float | None]
"""One evaluation, a number for each prompt in the data's order; None: no reward function applied."""

GAINED = 2.0
"""Something was gained if the best lies so many standard errors above the start."""


@dataclass(slots=True)
class Evaluations:
    """The first and the best evaluation of a run."""

    start: list[float | None] | None = None
    best: list[float | None] | None = None

    def add(self, rewards: Rewards) -> None:
        """Take in an evaluation; of two equal ones the later counts as the best."""
        if self.start is None:
            self.start = list(rewards)
        if self.best is None or _difference(rewards, self.best)[0] >= 0:
            self.best = list(rewards)

    def lost(self, rewards: Rewards, *, standard_errors: float) -> float:
        """Share of the gain that is lost, `(best - now) / (best - start)`, less so many standard errors of `best - now`.

        Where nothing has been gained it is the share of what there was at the start, and noise is always taken off.
        """
        if self.start is None or self.best is None:
            return 0.0
        gain, gain_error = _difference(self.best, self.start)
        fall, fall_error = _difference(self.best, rewards)
        if gain > GAINED * gain_error:
            return max(0.0, fall - standard_errors * fall_error) / gain
        at_stake = max(abs(mean_reward(self.start)), GAINED * gain_error, 1e-6)
        return max(0.0, fall - max(standard_errors, GAINED) * fall_error) / at_stake


def mean_reward(rewards: Rewards) -> float:
    """Mean over the prompts that have a reward; 0 where none has."""
    return statistics.fmean([r for r in rewards if r is not None] or [0.0])


def _difference(a: Rewards, b: Rewards) -> tuple[float, float]:
    """Mean of `a - b` over the prompts that have a reward in both, and its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not differences:
        return 0.0, 0.0
    # Of one prompt nothing is known but its own reward.
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return statistics.fmean(differences), error
