"""The alarms as a table: the metric each reads, how it is measured, and the kind of alarm. Limits are configured.

    for rule in RULES:
        watch, stop = config.guards.limits(rule.name)
        level = level_of(rule, value, watch, stop)      # and `alarm_of`, if it triggers
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config.guards import LOW_IS_BAD
from .trackers import Level


@dataclass(frozen=True, slots=True)
class Rule:
    """One alarm: the metric that it reads, how it is measured, and the kind of alarm."""

    name: str
    metric: str
    kind: Literal["batch", "policy", "advice"]
    measure: Literal["value", "over_running_mean", "long_mean", "over_start", "lost_gain"]
    text: str
    """Text after the name; {value} is the measured value, {metric} the raw metric."""
    held_at_best: bool = False
    """Not judged while the reward is at its best: a policy that improves also becomes more confident."""
    relative: tuple[float, float] | None = None
    """(origin, factor): the soft limit is at least `origin + factor * (start - origin)`: bf16's error differs by model."""


# The reward comes first: other rules depend on it.
RULES = (
    Rule("reward", "reward", "policy", "lost_gain", "{metric:.3g}: lost {value:.0%} of the gain"),
    Rule("sampler_kl", "sampling/kl", "batch", "value", "{metric:.3g}", relative=(0.0, 2.0)),
    Rule("sampler_ratio", "sampling/mean_exp_abs_difference", "batch", "value", "{metric:.3g}", relative=(1.0, 1.5)),
    Rule("effective_sample_size", "sampling/effective_sample_size", "batch", "value", "{metric:.2f}"),
    Rule("grad_norm", "grad_norm", "batch", "over_running_mean", "{metric:.3g} is {value:.1f} times its running mean"),
    Rule("entropy", "entropy", "policy", "over_start", "{metric:.2g} is {value:.0%} of its start", held_at_best=True),
    Rule(
        "advantage_scale",
        "advantage_scale",
        "policy",
        "over_start",
        "{metric:.3g} is {value:.1f} times its start",
        held_at_best=True,
    ),
    Rule("length", "completions/mean_length", "policy", "over_start", "{metric:.0f} tokens are {value:.1f} times its start"),
    Rule("zero_variance", "frac_reward_zero_std", "advice", "long_mean", "{value:.0%} of the groups have zero reward variance"),
)

EVALUATION = Rule("evaluation", "eval_reward", "policy", "lost_gain", "{metric:.3g}: lost {value:.0%} of the gain")
"""Judged when the run evaluates, not at every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A triggered alarm: `value` was compared with `limit`; `text` says it in one line.

    step: as shown: counted from 1, or the updates done before an evaluation.
    """

    step: int
    name: str
    level: Level
    value: float
    limit: float
    text: str


@dataclass(frozen=True, slots=True)
class Reading:
    """The level of a rule's value in a step, and the alarm if it triggered."""

    rule: Rule
    level: Level
    alarm: Alarm | None = None


def level_of(rule: Rule, value: float, watch: float | None, stop: float | None) -> Level:
    """The level of `value`; NaN is outside every limit that is set."""
    low_is_bad = rule.name in LOW_IS_BAD
    for level, limit in ((Level.STOP, stop), (Level.WATCH, watch)):
        if limit is not None and not (value >= limit if low_is_bad else value <= limit):
            return level
    return Level.INSIDE


def alarm_of(rule: Rule, step: int, level: Level, *, metric: float, value: float, limit: float) -> Alarm:
    """The alarm with its text; `metric` is the raw metric, `value` what the rule measured."""
    reading = rule.text.format(metric=metric, value=value) if math.isfinite(metric) else "is not finite"
    side = "below" if rule.name in LOW_IS_BAD else "above"
    text = f"step {step}: {rule.name} {reading} ({side} its {'soft' if level == Level.WATCH else 'hard'} limit of {limit:g})"
    return Alarm(step=step, name=rule.name, level=level, value=value, limit=limit, text=text)
