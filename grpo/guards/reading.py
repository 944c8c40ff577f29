"""From a step's numbers to readings: each rule's value and level, with the running means kept in `Trackers`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..config.guards import LOW_IS_BAD, GuardsConfig
from .evaluations import AT_BEST, Evaluations, Rewards, mean_reward
from .rules import EVALUATION, Reading, Rule, alarm_of, level_of
from .trackers import LONG_SPAN, SHORT_SPAN, Excursion, Level, Series, Trackers

NORM_SPIKE = 3.0
"""A gradient norm enters its running mean clamped to the mean times or divided by this factor."""


def read(rule: Rule, step: int, quantities: Mapping[str, float | None], trackers: Trackers, config: GuardsConfig) -> Reading:
    """Record the step's value and compare it with the limits. An alarm triggers if a limit was crossed."""
    metric = quantities.get(rule.metric)
    watch, stop = limits(rule, trackers, config)  # before the value is recorded: it must not change its limits
    value = None if metric is None else _measure(rule, metric, trackers, config)
    if metric is None or value is None:
        return Reading(rule, Level.INSIDE)
    level = level_of(rule, value, watch, stop)
    excursion = trackers.excursions.setdefault(rule.name, Excursion())
    if level == Level.INSIDE:
        # A short mean remembers so many steps: inside for fewer, it has not left its excursion.
        excursion.inside(needed=1 if rule.kind == "batch" else SHORT_SPAN)
        return Reading(rule, level)
    if rule.held_at_best and reward_is_at_best(trackers):
        return Reading(rule, Level.INSIDE)
    limit = stop if level == Level.STOP else watch
    assert limit is not None
    if not excursion.beyond(level):
        return Reading(rule, level)
    return Reading(rule, level, alarm_of(rule, step + 1, level, metric=metric, value=value, limit=limit))


def read_evaluation(
    step: int, rewards: Rewards, evaluations: Evaluations, trackers: Trackers, config: GuardsConfig
) -> Reading:
    """The share of the evaluations' gain that is lost beyond noise, compared with its limits."""
    watch, stop = config.limits(EVALUATION.name)
    value = evaluations.lost(rewards, standard_errors=evaluations.noise_margin)
    level = level_of(EVALUATION, value, watch, stop)
    excursion = trackers.excursions.setdefault(EVALUATION.name, Excursion())
    if level == Level.INSIDE:
        excursion.inside(needed=1)
    limit = stop if level == Level.STOP else watch
    if limit is None or level == Level.INSIDE or not excursion.beyond(level):
        return Reading(EVALUATION, level)
    return Reading(
        EVALUATION, level, alarm_of(EVALUATION, step, level, metric=mean_reward(rewards), value=value, limit=limit)
    )


def _measure(rule: Rule, metric: float, trackers: Trackers, config: GuardsConfig) -> float | None:
    """Record `metric`; returns what the rule compares with its limits, None if there is nothing to compare with yet."""
    if not math.isfinite(metric):
        # It enters no mean. It is as bad as can be for a batch, and no evidence about a policy.
        return math.nan if rule.kind == "batch" else None
    series = trackers.series.setdefault(rule.metric, Series())
    if rule.measure == "over_running_mean":
        return _over_running_mean(series, metric, config.baseline_steps)
    series.add(metric, baseline_steps=config.baseline_steps)
    has_start = series.count >= config.baseline_steps
    if rule.measure == "over_start":
        return series.over_start(low_is_bad=rule.name in LOW_IS_BAD) if has_start else None
    if rule.measure == "long_mean":
        return series.long if series.count >= LONG_SPAN else None
    if rule.measure == "lost_gain":
        return series.lost(standard_errors=3) if has_start else None
    return metric


def _over_running_mean(series: Series, metric: float, baseline_steps: int) -> float | None:
    """`metric` over the geometric mean of the earlier ones, in logarithms: norms scatter by factors."""
    if metric <= 0:
        return None
    logarithm, past = math.log(metric), series.long
    is_known = series.count >= baseline_steps
    # An outlier must not hide the next one; a new level is accepted after some steps.
    furthest = math.log(NORM_SPIKE) if is_known else math.inf
    series.add(min(max(logarithm, past - furthest), past + furthest), baseline_steps=baseline_steps)
    return clamped_exp(logarithm - past) if is_known else None


def limits(rule: Rule, trackers: Trackers, config: GuardsConfig) -> tuple[float | None, float | None]:
    """The configured limits, raised to this run's usual values if the rule is relative."""
    watch, stop = config.limits(rule.name)
    series = trackers.series.get(rule.metric, Series())
    if rule.measure == "over_running_mean":
        scatter = series.deviation()
        return _at_least(watch, clamped_exp(4 * scatter)), _at_least(stop, clamped_exp(5 * scatter))
    if rule.relative is None:
        return watch, stop
    origin, factor = rule.relative
    is_known = series.count >= config.baseline_steps
    return _at_least(watch, origin + factor * (series.start - origin)) if is_known else None, stop


def reward_is_at_best(trackers: Trackers) -> bool:
    """Whether the reward has lost no more than `AT_BEST` of its gain beyond noise."""
    reward = trackers.series.get("reward")
    return reward is not None and reward.best is not None and reward.lost(standard_errors=3) <= AT_BEST


def clamped_exp(exponent: float) -> float:
    """`exp`, without the OverflowError that Python raises above 700."""
    return math.exp(min(exponent, 700.0))


def _at_least(limit: float | None, usual: float) -> float | None:
    return None if limit is None else max(limit, usual)
