"""The alarms as a table: which metric each reads, what is made of it, and what kind of alarm it is. Limits are configured.

    for rule in RULES:
        watch, stop = config.guards.limits(rule.name)
        level = level_of(rule, value, watch, stop)      # and `alarm_of`, if it rings
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config.guards import LOW_IS_BAD
from .trackers import Level


@dataclass(frozen=True, slots=True)
class Rule:
    """One alarm: the metric that it reads, what is made of it, and what kind of alarm it is."""

    name: str
    metric: str
    kind: Literal["batch", "policy", "advice"]
    measure: Literal["value", "over_running_mean", "long_mean", "over_start", "lost_gain"]
    text: str
    """How a value reads after the name; {value} is the judged one, {metric} the metric's own."""
    held_at_best: bool = False
    """Not judged while the reward is at its best: a policy that gets better also becomes surer of itself."""
    relative: tuple[float, float] | None = None
    """(origin, factor): `watch` also needs `origin + factor * (start - origin)`, since what bf16 costs differs by model."""


# The reward comes first: other rules ask how it does.
RULES = (
    Rule("reward", "reward", "policy", "lost_gain", "{metric:.3g}: {value:.2f} of what was gained is lost"),
    Rule("sampler_kl", "sampling/kl", "batch", "value", "{metric:.3g}", relative=(0.0, 2.0)),
    Rule("sampler_ratio", "sampling/mean_exp_abs_difference", "batch", "value", "{metric:.3g}", relative=(1.0, 1.5)),
    Rule("effective_sample_size", "sampling/effective_sample_size", "batch", "value", "{metric:.2f}"),
    Rule("grad_norm", "grad_norm", "batch", "over_running_mean", "{metric:.3g} is {value:.1f} times its running mean"),
    Rule("entropy", "entropy", "policy", "over_start", "{metric:.2g} is {value:.2f} of its start", held_at_best=True),
    Rule(
        "advantage_scale",
        "advantage_scale",
        "policy",
        "over_start",
        "{metric:.3g} is {value:.1f} times its start",
        held_at_best=True,
    ),
    Rule("length", "completions/mean_length", "policy", "over_start", "{metric:.0f} tokens are {value:.1f} times its start"),
    Rule("zero_variance", "frac_reward_zero_std", "advice", "long_mean", "{value:.2f} of the groups teach nothing"),
)

EVALUATION = Rule("evaluation", "eval_reward", "policy", "lost_gain", "{metric:.3g}: {value:.2f} of what was gained is lost")
"""Not among the others: it is judged when the run evaluates, not at every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """An alarm that rang: `value` is what was compared with `limit`, `text` says it in one line."""

    step: int
    name: str
    level: Level
    value: float
    limit: float
    text: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rule says of a step: where its value is now, and the alarm if it rang."""

    rule: Rule
    level: Level
    alarm: Alarm | None = None


def level_of(rule: Rule, value: float, watch: float | None, stop: float | None) -> Level:
    """Where `value` is; NaN is beyond every limit that is on."""
    low_is_bad = rule.name in LOW_IS_BAD
    for level, limit in ((Level.STOP, stop), (Level.WATCH, watch)):
        if limit is not None and not (value >= limit if low_is_bad else value <= limit):
            return level
    return Level.INSIDE


def alarm_of(rule: Rule, step: int, level: Level, *, metric: float, value: float, limit: float) -> Alarm:
    """The alarm with its text; `metric` is what was measured, `value` what the rule made of it."""
    reading = rule.text.format(metric=metric, value=value) if math.isfinite(metric) else "is not finite"
    side = "below" if rule.name in LOW_IS_BAD else "above"
    text = f"step {step}: {rule.name} {reading} ({level.name.lower()} {side} {limit:g})"
    return Alarm(step=step, name=rule.name, level=level, value=value, limit=limit, text=text)
