"""Evaluations of one run: the first, the best, and how much of the gain is lost again.

    evaluations = Evaluations()
    for rewards in (before, at_step_20, now):
        if evaluations.accepts(rewards):
            evaluations.add(rewards)
    evaluations.lost(now, standard_errors=evaluations.noise_margin)     # 0.4: 40 % of the gain is lost again beyond noise

An evaluation is on the same prompts with the same random numbers each time, so two of them are compared prompt by prompt: most
prompts have the same reward in both, and the difference of the means is known far better than either mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Rewards = Sequence[float | None]
"""One evaluation, a number for each prompt in the data's order, the mean of its completions; None: no reward."""

AT_BEST = 0.05
"""A reward is at its best while no more than this share of its gain is lost."""


@dataclass(slots=True)
class Evaluations:
    """The first and the best evaluation of a run, and how many there were."""

    start: list[float | None] | None = None
    best: list[float | None] | None = None
    count: int = 0

    @property
    def noise_margin(self) -> float:
        """Standard errors treated as noise: two, more after many evaluations: the best of many is biased upwards."""
        return max(2.0, 1.0 + math.sqrt(2.0 * math.log(max(1, self.count))))

    def accepts(self, rewards: Rewards) -> bool:
        """Whether the evaluation is comparable: the same prompts have a reward as in the first. A failed reward is no fall."""
        has_reward = [reward is not None for reward in rewards]
        return any(has_reward) and (self.start is None or has_reward == [reward is not None for reward in self.start])

    def add(self, rewards: Rewards) -> None:
        """Record an accepted evaluation; of two equal ones the later counts as the best."""
        assert self.accepts(rewards)
        self.count += 1
        if self.start is None:
            self.start = list(rewards)
        if self.best is None or _difference(rewards, self.best)[0] >= 0:
            self.best = list(rewards)

    def lost(self, rewards: Rewards, *, standard_errors: float) -> float:
        """Share of the gain that is lost, `(best - now) / (best - start)`, less so many standard errors of `best - now`.

        If nothing was gained beyond noise, it is a share of the start value, or of the rewards' scatter if that is larger:
        rewards around 0 have nothing to lose a share of.
        """
        if self.start is None or self.best is None:
            return 0.0
        fall, error, scatter = _difference(self.best, rewards)
        return max(0.0, fall - standard_errors * error) / (self._gain() or self._at_stake(scatter))

    def is_at_best(self, rewards: Rewards) -> bool:
        """Whether a policy with these rewards is the best, or indistinguishable from it."""
        if self.start is None or self.best is None:
            return False
        fall, error, _ = _difference(self.best, rewards)
        return fall <= 0 or fall <= max(error, AT_BEST * self._gain()) * (self._gain() > 0)

    def _gain(self) -> float:
        """Best minus start; 0 if noise explains it."""
        assert self.start is not None and self.best is not None
        gain, error, _ = _difference(self.best, self.start)
        return gain if gain > self.noise_margin * error else 0.0

    def _at_stake(self, scatter: float) -> float:
        assert self.start is not None
        known = [reward for reward in self.start if reward is not None]
        return max(abs(statistics.fmean(known)), statistics.pstdev(known), scatter, 1e-6)


def mean_reward(rewards: Rewards) -> float:
    """Mean over the prompts that have a reward; NaN if none has."""
    known = [reward for reward in rewards if reward is not None]
    return statistics.fmean(known) if known else math.nan


def _difference(a: Rewards, b: Rewards) -> tuple[float, float, float]:
    """Mean of `a - b` over the prompts, its standard error (more for few prompts: Student's t), and one prompt's deviation."""
    differences = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    count = len(differences)
    if count < 2:  # one prompt has no known noise
        return statistics.fmean(differences or [0.0]), math.inf, 0.0
    deviation = statistics.stdev(differences)
    return statistics.fmean(differences), deviation / math.sqrt(count) * (1 + 4 / (count - 1)), deviation
