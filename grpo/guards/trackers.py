"""The guards' statistics of a run's metrics: running means, noise, the best so far, and which alarms have triggered.

    series = Series()
    for reward in rewards:
        series.add(reward, baseline_steps=5)
    series.lost(standard_errors=3)          # 0.4: 40 % of the gain is lost again beyond noise

Plain Python numbers; a checkpoint holds `dataclasses.asdict` of a `Trackers`, and `Trackers.from_dict` reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

SHORT_SPAN, LONG_SPAN = 5, 20
"""Spans, in steps, of the running means: the short one describes the current policy, the long one is its reference."""

SHORT_VARIANCE, LONG_VARIANCE = 1 / 5, 1 / 20
"""Variances of these means over that of one value: w / (2 - w) with w = 2 / (span + 1). A start of 5 steps has 1/5 too."""


class Level(IntEnum):
    """Where a value lies: inside its limits, above the soft limit (`watch`), or above the hard limit (`stop`)."""

    INSIDE = 0
    WATCH = 1
    STOP = 2


@dataclass(slots=True)
class Series:
    """The history of one quantity: running means, each a plain mean at first, then exponential."""

    count: int = 0
    last: float = 0.0
    short: float = 0.0
    long: float = 0.0
    variance: float = 0.0
    """Of one step's value: half the mean squared difference of neighbours, which a trend hardly changes."""
    start: float = 0.0
    """Mean of the first `baseline_steps` values, and the standard deviation of one value in them."""
    start_deviation: float = 0.0
    best: float | None = None
    """Highest long mean that lay above the start by more than noise, and one value's standard deviation then."""
    best_deviation: float = 0.0
    best_short: float | None = None
    """Highest short mean, biased upwards by noise."""
    last_is_low: bool = False
    """Whether the last value lies below the best short mean by more than two standard deviations, both from before it."""

    def add(self, value: float, *, baseline_steps: int) -> None:
        self.last_is_low = self.best_short is not None and value < self.best_short - 2 * self.deviation()
        self.count += 1
        if self.count > 1:
            self.variance += ((value - self.last) ** 2 / 2 - self.variance) * _weight(self.count - 1, LONG_SPAN)
        self.short += (value - self.short) * _weight(self.count, SHORT_SPAN)
        self.long += (value - self.long) * _weight(self.count, LONG_SPAN)
        self.best_short = self.short if self.best_short is None else max(self.best_short, self.short)
        self.last = value
        deviation = self.deviation()
        if self.count <= baseline_steps:
            self.start += (value - self.start) / self.count
            self.start_deviation = deviation
            return
        noise = 3 * max(deviation, self.start_deviation) * math.sqrt(LONG_VARIANCE + SHORT_VARIANCE)
        if self.long - self.start > max(noise, 1e-6) and (self.best is None or self.long > self.best):
            self.best, self.best_deviation = self.long, deviation

    def deviation(self) -> float:
        """Standard deviation of one step's value; more than measured while there are few values (Student's t)."""
        if self.count < 2:
            return 0.0
        return math.sqrt(self.variance) * (1 + 4 / (min(self.count, LONG_SPAN) - 1))

    def lost(self, *, standard_errors: float) -> float:
        """Share of the gain that is lost again, `(best - now) / (best - start)`, less what noise explains.

        `now` is the short mean and `best` the best long mean; the best of many short means would be biased upwards. If nothing
        was gained, it is a share of the start value.
        """
        deviation = self.deviation()
        if self.best is None:
            past, past_deviation, past_variance = self.start, self.start_deviation, SHORT_VARIANCE
            at_stake = max(abs(self.start), 3 * max(deviation, self.start_deviation), 1e-6)
        else:
            past, past_deviation, past_variance = self.best, self.best_deviation, LONG_VARIANCE
            at_stake = self.best - self.start
        # A rare reward looks noiseless between two successes: the noise when the past was measured counts as well.
        noise = standard_errors * max(deviation, past_deviation) * math.sqrt(SHORT_VARIANCE + past_variance)
        return max(0.0, past - self.short - noise) / at_stake

    def is_near_its_best(self) -> bool:
        """Whether the short mean is within one standard error of its highest value, and the last value is not low."""
        if self.last_is_low:
            return False
        return self.best_short is None or self.short >= self.best_short - self.deviation() * math.sqrt(SHORT_VARIANCE)

    def over_start(self, *, low_is_bad: bool) -> float | None:
        """The short mean over the start. If high is bad: the lowest ratio within 3 standard errors."""
        if self.start <= 0:
            return None
        if low_is_bad:
            return self.short / self.start
        errors = 3 * math.sqrt(SHORT_VARIANCE)
        return (self.short - errors * self.deviation()) / (self.start + errors * self.start_deviation)


def _weight(count: int, span: int) -> float:
    """Weight of the newest of `count` values in a running mean."""
    return max(1 / count, 2 / (span + 1))


@dataclass(slots=True)
class Excursion:
    """The worst level of an alarm's value since it was last inside its limits."""

    worst: int = Level.INSIDE
    steps_inside: int = 0

    def beyond(self, level: Level) -> bool:
        """Record a value outside; returns whether its level is worse than before."""
        self.steps_inside = 0
        is_worse = level > self.worst
        self.worst = max(self.worst, int(level))
        return is_worse

    def inside(self, *, needed: int) -> None:
        """Record a value inside; after `needed` in a row the alarm can trigger again."""
        self.steps_inside += 1
        if self.steps_inside >= needed:
            self.worst = Level.INSIDE


@dataclass(slots=True)
class Trackers:
    """What depends on the current policy, and is rolled back with it."""

    series: dict[str, Series] = field(default_factory=dict)
    """By metric."""
    excursions: dict[str, Excursion] = field(default_factory=dict)
    """By alarm."""

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Trackers:
        return cls(
            series={name: Series(**values) for name, values in state["series"].items()},
            excursions={name: Excursion(**values) for name, values in state["excursions"].items()},
        )


@dataclass(slots=True)
class Counters:
    """What belongs to the run and is never rolled back."""

    learning_rate_factor: float = 1.0
    triggers: list[int] = field(default_factory=list)
    """Steps of the alarms that still count."""
    last_trigger: int | None = None
    alarms: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    halvings: int = 0
    restores: int = 0


@dataclass(slots=True)
class TakenSnapshot:
    """The guards' data about a snapshot: its step (updates done) and the trackers of then."""

    step: int
    trackers: Trackers
    restores: int = 0
    """How often it was restored."""
    is_evaluated: bool = False
    """Whether the evaluation snapshot holds the same policy."""

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> TakenSnapshot:
        return cls(**{**state, "trackers": Trackers.from_dict(state["trackers"])})
