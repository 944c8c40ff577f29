"""Alarms of a run, and what follows from them: skip an update, halve the learning rate, go back to the last healthy policy.

    guards = Guards(config.guards)
    verdict = guards.judge(step, {"reward": 0.4, "grad_norm": 0.2, "entropy": 1.1})   # after backward, before the update
    if verdict.restore:
        snapshot.restore()
        guards.restored()
    elif not verdict.skip:
        if verdict.healthy:
            snapshot.take(step)
        optimizer.step()
    rate = schedule(step) * guards.learning_rate_factor

The rollouts of a step measure the policy that is in memory until that step's update. So a snapshot that is taken between
`judge` and the update is of a policy whose own reward has just been seen to be good.

Three kinds of alarm. `batch`: this batch is no basis for an update; beyond `stop` the update is skipped. `policy`: the policy
itself goes wrong; beyond `stop` it is taken back. `advice`: shown, nothing follows. An alarm rings when its value crosses a
limit, and again only after it has been back inside. Two rings in a window halve the learning rate, three take the policy back.

What noise explains is no fault: a step's reward is a mean of few completions, so a fall counts by what is beyond 3 standard
errors, a gradient's norm by its own scatter, the sampler's gap by what it was at the start. Otherwise healthy runs would be
halved and taken back, at low base rates of success most of all.

All of it is arithmetic on a dozen Python floats (`guard_trackers.py`); limits are those of `config_guards.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .config_guards import LOW_IS_BAD, GuardsConfig
from .guard_rules import RULES, Rule
from .guard_trackers import LONG_SPAN, SHORT_SPAN, Excursion, Level, Series, Trackers

QUIET_STEPS = 3
"""No snapshot is taken so shortly after an alarm, in steps: a fault may show in one quantity before the others."""

NORM_SPIKE = 3.0
"""A gradient norm enters its running mean as at most so many times that mean, and at least one such part of it."""

SKIP_REMEDY = (
    "lower optim.learning_rate; where the sampler's gap is too wide, sample with top_p 1, top_k -1 and min_p 0, or see whether "
    "the sampler is the policy with `rankup check`"
)
RESTORE_REMEDY = "even at a lower learning rate: lower optim.learning_rate, or raise guards.max_restores"

AT_BEST = 0.05
"""The reward is at its best while no more than this share of its gain is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """An alarm that rang: `value` is what was compared with `limit`, `text` says it in one line."""

    step: int
    name: str
    level: Level
    value: float
    limit: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do with a step's update. `text` says in one line what was decided; it is empty where nothing was."""

    alarms: tuple[Alarm, ...] = ()
    skip: bool = False
    restore: bool = False
    healthy: bool = False
    """The policy that sampled this step is worth a snapshot."""
    give_up: bool = False
    """The run should stop: updates have been skipped for too long."""
    text: str = ""


@dataclass(slots=True)
class Counters:
    """What belongs to the run, whatever becomes of its policy."""

    learning_rate_factor: float = 1.0
    rings: list[int] = field(default_factory=list)
    """Steps of the rings that still count."""
    last_ring: int | None = None
    snapshot_step: int | None = None
    alarms: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    halvings: int = 0
    restores: int = 0
    restores_of_snapshot: int = 0


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a rule says of a step: where its value is now, and the alarm if it rang."""

    rule: Rule
    level: Level
    alarm: Alarm | None


class Guards:
    """Judges every step of a run. See the module's docstring."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self._now = Trackers()
        self._at_snapshot: Trackers | None = None
        self._counters = Counters()

    @property
    def learning_rate_factor(self) -> float:
        """What the schedule's learning rate is multiplied with: 1, or less after halvings."""
        return self._counters.learning_rate_factor

    def judge(self, step: int, quantities: Mapping[str, float | None]) -> Verdict:
        """What to do with the update of `step`; `quantities` are metrics by name, and what is absent is not judged.

        Call it once a step, after the backward pass and before the update, with steps that rise. If the verdict says
        `restore`, do it and call `restored`; if it says `healthy`, take the snapshot before the update.
        """
        readings = [self._read(rule, step, quantities) for rule in RULES] if self.config.enabled else []
        counted = [reading for reading in readings if reading.rule.kind != "advice"]
        restore, halve = self._count_rings(step, counted)
        halved = halve and self._halve()
        reasons = [] if restore else self._reasons_to_skip(counted, quantities.get("grad_norm"))
        give_up = self._count_skip(bool(reasons))
        if restore and self._counters.restores_of_snapshot >= self.config.max_restores:
            give_up = f"the run stops: nothing has led on from step {self._counters.snapshot_step}, {RESTORE_REMEDY}"
        healthy = self.config.enabled and not restore and not reasons and self._is_healthy(step, counted)
        if healthy:
            self._counters.snapshot_step, self._counters.restores_of_snapshot = step, 0
            self._at_snapshot = copy.deepcopy(self._now)
        return Verdict(
            alarms=tuple(reading.alarm for reading in readings if reading.alarm is not None),
            skip=bool(reasons),
            restore=restore,
            healthy=healthy,
            give_up=bool(give_up),
            text=self._text(step, restore=restore, reasons=reasons, halved=halved, give_up=give_up),
        )

    def allows(self, step: int, grad_norm: float) -> str:
        """Whether a further update within the step may be applied: empty, or why not. Such a skip is counted."""
        reason = "the gradient is not finite" if not math.isfinite(grad_norm) else ""
        rule = next(rule for rule in RULES if rule.name == "grad_norm")
        series, (_, stop) = self._now.series.get(rule.metric, Series()), self._limits(rule)
        is_known = series.count >= self.config.baseline_steps and grad_norm > 0
        if not reason and self.config.enabled and self.config.skip and stop is not None and is_known:
            ratio = _exp(math.log(grad_norm) - series.long)
            reason = f"grad_norm {grad_norm:.3g} is {ratio:.1f} times its running mean" if ratio > stop else ""
        self._counters.skipped_steps += bool(reason)
        return f"step {step}: skipped a further update ({reason})" if reason else ""

    def restored(self) -> None:
        """Adapter and optimizer are again those of the snapshot: so are all running means; the learning rate stays low."""
        assert self._at_snapshot is not None
        self._now = copy.deepcopy(self._at_snapshot)
        self._counters.rings.clear()
        self._counters.restores += 1
        self._counters.restores_of_snapshot += 1

    def ends_unhealthy(self) -> bool:
        """Whether the run should end with the snapshot: so much of the reward's gain is lost that the alarm watches."""
        limit = self.config.reward_watch
        reward = self._now.series.get("reward")
        return self._can_restore and limit is not None and reward is not None and reward.lost(standard_errors=3) > limit

    def metrics(self) -> dict[str, float]:
        """Counts since the start of the run, and the factor of the learning rate."""
        counters = self._counters
        return {
            "guards/alarms": float(counters.alarms),
            "guards/skipped_steps": float(counters.skipped_steps),
            "guards/halvings": float(counters.halvings),
            "guards/restores": float(counters.restores),
            "guards/learning_rate_factor": counters.learning_rate_factor,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that later verdicts depend on, as plain data that JSON holds without loss."""
        return {
            "now": asdict(self._now),
            "at_snapshot": None if self._at_snapshot is None else asdict(self._at_snapshot),
            "counters": asdict(self._counters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same configuration."""
        at_snapshot = state["at_snapshot"]
        self._now = Trackers.from_dict(state["now"])
        self._at_snapshot = None if at_snapshot is None else Trackers.from_dict(at_snapshot)
        self._counters = Counters(**copy.deepcopy(dict(state["counters"])))

    # ---------------------------------------------------------------------------------------------- reading

    def _read(self, rule: Rule, step: int, quantities: Mapping[str, float | None]) -> _Reading:
        """Take in the step's value, compare it with the limits, and ring if a limit was crossed."""
        metric = quantities.get(rule.metric)
        watch, stop = self._limits(rule)  # before the value is taken in: it must not move its own limits
        value = None if metric is None else self._measure(rule, metric)
        if metric is None or value is None:
            return _Reading(rule, Level.INSIDE, None)
        level = _level(value, watch, stop, low_is_bad=rule.name in LOW_IS_BAD)
        excursion = self._now.excursions.setdefault(rule.name, Excursion())
        if level == Level.INSIDE:
            # A short mean remembers so many steps: inside for fewer, it has not left its excursion.
            excursion.inside(needed=1 if rule.kind == "batch" else SHORT_SPAN)
            return _Reading(rule, level, None)
        if rule.held_at_best and self._reward_is_at_best():
            return _Reading(rule, Level.INSIDE, None)
        limit = stop if level == Level.STOP else watch
        assert limit is not None
        rings = excursion.beyond(level)
        alarm = _alarm(rule, step, level, metric=metric, value=value, limit=limit) if rings else None
        return _Reading(rule, level, alarm)

    def _measure(self, rule: Rule, metric: float) -> float | None:
        """What the rule compares with its limits, with `metric` taken in. None: there is nothing to compare with yet."""
        if not math.isfinite(metric):
            # No mean may take it in. For a batch it is as bad as can be; of a policy it says nothing.
            return math.nan if rule.kind == "batch" else None
        series = self._now.series.setdefault(rule.metric, Series())
        if rule.measure == "over_running_mean":
            return self._over_running_mean(series, metric)
        series.add(metric, baseline_steps=self.config.baseline_steps)
        has_start = series.count >= self.config.baseline_steps
        if rule.measure == "over_start":
            return series.over_start(low_is_bad=rule.name in LOW_IS_BAD) if has_start else None
        if rule.measure == "long_mean":
            return series.long if series.count >= LONG_SPAN else None
        if rule.measure == "lost_gain":
            return series.lost(standard_errors=3) if has_start else None
        return metric

    def _over_running_mean(self, series: Series, metric: float) -> float | None:
        """`metric` over the geometric mean of those before it, in logarithms: norms scatter by factors."""
        if metric <= 0:
            return None
        logarithm, past = math.log(metric), series.long
        is_known = series.count >= self.config.baseline_steps
        # An outlier must not hide the next one; a new level is accepted after some steps.
        furthest = math.log(NORM_SPIKE) if is_known else math.inf
        series.add(min(max(logarithm, past - furthest), past + furthest), baseline_steps=self.config.baseline_steps)
        return _exp(logarithm - past) if is_known else None

    def _limits(self, rule: Rule) -> tuple[float | None, float | None]:
        """The configured limits, raised to what is usual in this run where the rule says so."""
        watch, stop = self.config.limits(rule.name)
        series = self._now.series.get(rule.metric, Series())
        if rule.measure == "over_running_mean":
            scatter = series.deviation()
            return _at_least(watch, _exp(4 * scatter)), _at_least(stop, _exp(5 * scatter))
        if rule.relative is None:
            return watch, stop
        origin, factor = rule.relative
        is_known = series.count >= self.config.baseline_steps
        return _at_least(watch, origin + factor * (series.start - origin)) if is_known else None, stop

    def _reward_is_at_best(self) -> bool:
        reward = self._now.series.get("reward")
        return reward is not None and reward.best is not None and reward.lost(standard_errors=3) <= AT_BEST

    # --------------------------------------------------------------------------------------------- deciding

    @property
    def _can_restore(self) -> bool:
        return self.config.enabled and self.config.restore and self._at_snapshot is not None

    def _count_rings(self, step: int, readings: Sequence[_Reading]) -> tuple[bool, bool]:
        """Take in this step's rings; returns whether to restore and whether to halve."""
        rang = [reading for reading in readings if reading.alarm is not None]
        if not rang:
            return False, False
        counters = self._counters
        counters.alarms += len(rang)
        counters.last_ring = step
        # The sampler's three alarms measure one gap in three ways: together they are one sign that something is wrong.
        signs = {reading.rule.metric.partition("/")[0] for reading in rang}
        counters.rings = [ring for ring in counters.rings if ring > step - self.config.window_steps] + [step] * len(signs)
        policy_stops = any(reading.rule.kind == "policy" and reading.level == Level.STOP for reading in rang)
        restore = self._can_restore and (policy_stops or len(counters.rings) >= 3)
        return restore, policy_stops or len(counters.rings) >= 2

    def _halve(self) -> bool:
        """Lower the learning rate, unless that is switched off or it is as low as it goes."""
        counters, lowest = self._counters, self.config.min_learning_rate_factor
        if not self.config.halve or counters.learning_rate_factor <= lowest:
            return False
        counters.learning_rate_factor = max(lowest, counters.learning_rate_factor / 2)
        counters.halvings += 1
        return True

    def _reasons_to_skip(self, readings: Sequence[_Reading], grad_norm: float | None) -> list[str]:
        """Alarms for which this batch is no basis for an update."""
        if grad_norm is not None and not math.isfinite(grad_norm):  # such an update destroys the adapter, guarded or not
            return ["the gradient is not finite"]
        if not self.config.skip:
            return []
        return [f"{r.rule.name} is beyond its limit" for r in readings if r.rule.kind == "batch" and r.level == Level.STOP]

    def _count_skip(self, skip: bool) -> str:
        """Returns why the run should stop, empty where it should not."""
        self._counters.skipped_steps += skip
        self._counters.consecutive_skips = self._counters.consecutive_skips + 1 if skip else 0
        if self._counters.consecutive_skips < self.config.max_consecutive_skips:
            return ""
        return f"the run stops after {self._counters.consecutive_skips} skipped updates in a row: {SKIP_REMEDY}"

    def _is_healthy(self, step: int, readings: Sequence[_Reading]) -> bool:
        """Whether a snapshot is worth taking: all is quiet, the reward is near its best, and the last one is old enough.

        Stricter than an alarm: a policy that falls too fast to be told from noise must not become the one to go back to.
        """
        counters, reward = self._counters, self._now.series.get("reward")
        return (
            self.config.restore
            and all(reading.level == Level.INSIDE for reading in readings)
            and not self._entropy_has_dropped()
            and (counters.last_ring is None or step - counters.last_ring > QUIET_STEPS)
            and (counters.snapshot_step is None or step - counters.snapshot_step >= self.config.snapshot_steps)
            and (reward is None or reward.is_near_its_best())
        )

    def _entropy_has_dropped(self) -> bool:
        """Whether this step's own entropy is below the limit that its mean has yet to reach."""
        series, watch = self._now.series.get("entropy"), self.config.entropy_watch
        if series is None or watch is None or series.count < self.config.baseline_steps or self._reward_is_at_best():
            return False
        return series.last < watch * series.start

    def _text(self, step: int, *, restore: bool, reasons: Sequence[str], halved: bool, give_up: str) -> str:
        parts = []
        if restore:
            parts.append(f"restored the adapter and optimizer that sampled step {self._counters.snapshot_step}")
        if reasons:
            parts.append(f"skipped the update ({', '.join(reasons)})")
        if halved:
            parts.append(f"learning rate x {self.learning_rate_factor:g}")
        if give_up:
            parts.append(give_up)
        return f"step {step}: {', '.join(parts)}" if parts else ""


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, 700.0))  # Python raises where the result is infinite


def _at_least(limit: float | None, usual: float) -> float | None:
    return None if limit is None else max(limit, usual)


def _level(value: float, watch: float | None, stop: float | None, *, low_is_bad: bool) -> Level:
    """Where `value` is; NaN is beyond every limit that is on."""
    for level, limit in ((Level.STOP, stop), (Level.WATCH, watch)):
        if limit is not None and not (value >= limit if low_is_bad else value <= limit):
            return level
    return Level.INSIDE


def _alarm(rule: Rule, step: int, level: Level, *, metric: float, value: float, limit: float) -> Alarm:
    reading = rule.text.format(metric=metric, value=value) if math.isfinite(metric) else "is not finite"
    side = "below" if rule.name in LOW_IS_BAD else "above"
    text = f"step {step}: {rule.name} {reading} ({level.name.lower()} {side} {limit:g})"
    return Alarm(step=step, name=rule.name, level=level, value=value, limit=limit, text=text)
