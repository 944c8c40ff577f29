"""Alarms of a run, and what follows from them: skip an update, halve the learning rate, go back to the last healthy policy.

    guards = Guards(config.guards)
    verdict = guards.judge(step, {"reward": 0.4, "grad_norm": 0.2, "entropy": 1.1})   # after backward, before the update
    if verdict.restore:
        snapshots[verdict.restore].restore()
        guards.restored(verdict.restore)
    elif not verdict.skip:
        if verdict.healthy:
            snapshots["step"].take(step)
        optimizer.step()
    rate = schedule(step) * guards.learning_rate_factor

The rollouts of a step measure the policy that is in memory until that step's update. So a snapshot that is taken between
`judge` and the update is of a policy whose own reward has just been seen to be good.

Where the run evaluates as it goes, an evaluation is the better witness: it is greedy, on the same prompts each time, and its
noise is known. The policy that it shows to be at its best has a snapshot of its own, which is put back if a later one has
fallen, and with which the run ends if the last one is clearly below it:

    verdict = guards.judge_evaluation(step, rewards)      # between two steps; the same three answers

Three kinds of alarm. `batch`: this batch is no basis for an update; beyond `stop` the update is skipped. `policy`: the policy
itself goes wrong; beyond `stop` it is taken back. `advice`: shown, nothing follows. An alarm rings when its value crosses a
limit, and again only after it has been back inside. Two rings in a window halve the learning rate, three take the policy back.

What noise explains is no fault: a step's reward is a mean of few completions, so a fall counts by what is beyond 3 standard
errors, a gradient's norm by its own scatter, the sampler's gap by what it was at the start. Otherwise healthy runs would be
halved and taken back, at low base rates of success most of all.

All of it is arithmetic on a dozen Python floats (`guard_trackers.py`, `guard_evaluations.py`); the alarms are listed in
`guard_rules.py`, their limits in `config_guards.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..config.guards import LOW_IS_BAD, GuardsConfig
from .evaluations import AT_BEST, Evaluations, Rewards, mean_reward
from .rules import EVALUATION, RULES, Alarm, Reading, Rule, alarm_of, level_of
from .trackers import LONG_SPAN, SHORT_SPAN, Counters, Excursion, Kept, Level, Series, Trackers

Witness = Literal["step", "evaluation"]
"""What has shown a policy to be good, and so which of the two snapshots it is in."""

QUIET_STEPS = 3
"""No snapshot is taken so shortly after an alarm, in steps: a fault may show in one quantity before the others."""

NORM_SPIKE = 3.0
"""A gradient norm enters its running mean as at most so many times that mean, and at least one such part of it."""

SKIP_REMEDY = (
    "lower optim.learning_rate; where the sampler's gap is too wide, sample with top_p 1, top_k -1 and min_p 0, or see whether "
    "the sampler is the policy with `rankup check`"
)
RESTORE_REMEDY = "even at a lower learning rate: lower optim.learning_rate, or raise guards.max_restores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do with a step's update, or after an evaluation. `text` says in one line what was decided, if anything was."""

    alarms: tuple[Alarm, ...] = ()
    skip: bool = False
    restore: Witness | None = None
    """The snapshot to put back."""
    healthy: bool = False
    """The policy that was seen (that sampled this step, or was evaluated) is worth a snapshot."""
    give_up: bool = False
    """The run should stop: updates have been skipped for too long, or nothing leads on from a snapshot."""
    text: str = ""


class Guards:
    """Judges every step of a run. See the module's docstring."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self._now = Trackers()
        self._kept: dict[Witness, Kept] = {}
        self._evaluations = Evaluations()
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
        restore, halve = self._count_rings(step, counted, self._witness())
        halved = halve and self._halve()
        reasons = [] if restore else self._reasons_to_skip(counted, quantities.get("grad_norm"))
        give_up = self._count_skip(bool(reasons)) or self._nothing_leads_on(restore)
        if give_up and self._can_restore(self._witness()):
            restore = self._witness()
        healthy = self.config.enabled and not restore and not reasons and self._is_healthy(step, counted)
        if healthy:
            self._kept["step"] = Kept(step, copy.deepcopy(self._now))
        return Verdict(
            alarms=tuple(reading.alarm for reading in readings if reading.alarm is not None),
            skip=bool(reasons),
            restore=restore,
            healthy=healthy,
            give_up=bool(give_up),
            text=self._text(step, restore, reasons=reasons, halved=halved, give_up=give_up),
        )

    def judge_evaluation(self, step: int, rewards: Rewards) -> Verdict:
        """What an evaluation after `step` updates says of the policy; `rewards` are of the same prompts each time.

        One in which other prompts have a reward than at the start says nothing.

        Call it between two steps. If the verdict says `restore`, put back the evaluations' snapshot, take it for the steps'
        snapshot as well, and call `restored("evaluation")`; if it says `healthy`, take the evaluations' snapshot now.
        """
        if not self.config.enabled or not self._evaluations.accepts(rewards):
            return Verdict()
        self._evaluations.add(rewards)
        reading = self._read_evaluation(step, rewards)
        restore, halve = self._count_rings(step, [reading], "evaluation")
        halved = halve and self._halve()
        give_up = self._nothing_leads_on(restore)
        healthy = self.config.restore and not restore and self._evaluations.is_at_best(rewards)
        if healthy:
            self._kept["evaluation"] = Kept(step, copy.deepcopy(self._now))
        return Verdict(
            alarms=() if reading.alarm is None else (reading.alarm,),
            restore=restore,
            healthy=healthy,
            give_up=bool(give_up),
            text=self._text(step, restore, halved=halved, give_up=give_up),
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

    def restored(self, witness: Witness = "step") -> None:
        """Adapter and optimizer are again those of the snapshot: so are all running means; the learning rate stays low."""
        kept = self._kept[witness]
        self._now = copy.deepcopy(kept.trackers)
        kept.restores += 1
        if witness == "evaluation":
            # What the steps have found healthy since then has turned out not to be. After E updates, step E + 1 is sampled.
            self._kept["step"] = Kept(kept.step + 1, copy.deepcopy(kept.trackers), kept.restores, is_evaluated=True)
        elif kept.is_evaluated:  # the same policy: its restores are counted together
            self._kept["evaluation"].restores = kept.restores
        self._counters.rings.clear()
        self._counters.restores += 1

    def ends_with(self, rewards: Rewards | None = None) -> Witness | None:
        """Which snapshot the run should end with, None for the policy as it is. `rewards`: of the last evaluation.

        Among evaluations the best is known: the last one may have lost as much of it as a standard error explains, and 0.05 of
        the gain. Without them the training reward decides: so much of its gain must be lost that the alarm watches.
        """
        if rewards is not None and self._can_restore("evaluation"):
            is_judged = self.config.evaluation_watch is not None and self._evaluations.accepts(rewards)
            return "evaluation" if is_judged and self._evaluations.lost(rewards, standard_errors=1) > AT_BEST else None
        limit, reward = self.config.reward_watch, self._now.series.get("reward")
        if limit is None or reward is None or not self._can_restore("step"):
            return None
        return "step" if reward.lost(standard_errors=3) > limit else None

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
            "kept": {witness: asdict(kept) for witness, kept in self._kept.items()},
            "evaluations": asdict(self._evaluations),
            "counters": asdict(self._counters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same configuration."""
        self._now = Trackers.from_dict(state["now"])
        self._kept = {witness: Kept.from_dict(kept) for witness, kept in state["kept"].items()}
        self._evaluations = Evaluations(**copy.deepcopy(dict(state["evaluations"])))
        self._counters = Counters(**copy.deepcopy(dict(state["counters"])))

    # ---------------------------------------------------------------------------------------------- reading

    def _read(self, rule: Rule, step: int, quantities: Mapping[str, float | None]) -> Reading:
        """Take in the step's value, compare it with the limits, and ring if a limit was crossed."""
        metric = quantities.get(rule.metric)
        watch, stop = self._limits(rule)  # before the value is taken in: it must not move its own limits
        value = None if metric is None else self._measure(rule, metric)
        if metric is None or value is None:
            return Reading(rule, Level.INSIDE)
        level = level_of(rule, value, watch, stop)
        excursion = self._now.excursions.setdefault(rule.name, Excursion())
        if level == Level.INSIDE:
            # A short mean remembers so many steps: inside for fewer, it has not left its excursion.
            excursion.inside(needed=1 if rule.kind == "batch" else SHORT_SPAN)
            return Reading(rule, level)
        if rule.held_at_best and self._reward_is_at_best():
            return Reading(rule, Level.INSIDE)
        limit = stop if level == Level.STOP else watch
        assert limit is not None
        rings = excursion.beyond(level)
        return Reading(rule, level, alarm_of(rule, step, level, metric=metric, value=value, limit=limit) if rings else None)

    def _read_evaluation(self, step: int, rewards: Rewards) -> Reading:
        """How much of what the evaluations had gained is lost beyond noise; rings as the other alarms do."""
        watch, stop = self.config.limits(EVALUATION.name)
        value = self._evaluations.lost(rewards, standard_errors=self._evaluations.luck)
        level = level_of(EVALUATION, value, watch, stop)
        excursion = self._now.excursions.setdefault(EVALUATION.name, Excursion())
        if level == Level.INSIDE:
            excursion.inside(needed=1)
        limit = stop if level == Level.STOP else watch
        if limit is None or level == Level.INSIDE or not excursion.beyond(level):
            return Reading(EVALUATION, level)
        return Reading(
            EVALUATION, level, alarm_of(EVALUATION, step, level, metric=mean_reward(rewards), value=value, limit=limit)
        )

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

    def _can_restore(self, witness: Witness) -> bool:
        return self.config.enabled and self.config.restore and witness in self._kept

    def _witness(self) -> Witness:
        """Whose snapshot a step's restore puts back: after a fallen evaluation, no step is a witness against it."""
        evaluation = self._now.excursions.get(EVALUATION.name)
        has_fallen = evaluation is not None and evaluation.worst > Level.INSIDE
        return "evaluation" if has_fallen and self._can_restore("evaluation") else "step"

    def _nothing_leads_on(self, restore: Witness | None) -> str:
        """Why the run should stop after this restore, empty where it should not."""
        if restore is None or self._kept[restore].restores < self.config.max_restores:
            return ""
        return f"the run stops: nothing has led on from step {self._kept[restore].step}, {RESTORE_REMEDY}"

    def _count_rings(self, step: int, readings: Sequence[Reading], witness: Witness) -> tuple[Witness | None, bool]:
        """Take in this step's rings; returns what to restore (`witness`, or nothing) and whether to halve."""
        rang = [reading for reading in readings if reading.alarm is not None]
        if not rang:
            return None, False
        counters = self._counters
        counters.alarms += len(rang)
        counters.last_ring = step
        # The sampler's three alarms measure one gap in three ways: together they are one sign that something is wrong.
        signs = {reading.rule.metric.partition("/")[0] for reading in rang}
        counters.rings = [ring for ring in counters.rings if ring > step - self.config.window_steps] + [step] * len(signs)
        policy_stops = any(reading.rule.kind == "policy" and reading.level == Level.STOP for reading in rang)
        restore = self._can_restore(witness) and (policy_stops or len(counters.rings) >= 3)
        return witness if restore else None, policy_stops or len(counters.rings) >= 2

    def _halve(self) -> bool:
        """Lower the learning rate, unless that is switched off or it is as low as it goes."""
        counters, lowest = self._counters, self.config.min_learning_rate_factor
        if not self.config.halve or counters.learning_rate_factor <= lowest:
            return False
        counters.learning_rate_factor = max(lowest, counters.learning_rate_factor / 2)
        counters.halvings += 1
        return True

    def _reasons_to_skip(self, readings: Sequence[Reading], grad_norm: float | None) -> list[str]:
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

    def _is_healthy(self, step: int, readings: Sequence[Reading]) -> bool:
        """Whether a snapshot is worth taking: all is quiet, the reward is near its best, and the last one is old enough.

        Stricter than an alarm: a policy that falls too fast to be told from noise must not become the one to go back to.
        """
        last_ring, reward = self._counters.last_ring, self._now.series.get("reward")
        evaluation, kept = self._now.excursions.get(EVALUATION.name), self._kept.get("step")
        return (
            self.config.restore
            and all(reading.level == Level.INSIDE for reading in readings)
            and not self._entropy_has_dropped()
            and (evaluation is None or evaluation.worst == Level.INSIDE)
            and (last_ring is None or step - last_ring > QUIET_STEPS)
            and (kept is None or step - kept.step >= self.config.snapshot_steps)
            and (reward is None or reward.is_near_its_best())
        )

    def _entropy_has_dropped(self) -> bool:
        """Whether this step's own entropy is below the limit that its mean has yet to reach."""
        series, watch = self._now.series.get("entropy"), self.config.entropy_watch
        if series is None or watch is None or series.count < self.config.baseline_steps or self._reward_is_at_best():
            return False
        return series.last < watch * series.start

    def _text(
        self, step: int, restore: Witness | None, *, halved: bool, give_up: str, reasons: Sequence[str] = ()
    ) -> str:
        parts = []
        if restore is not None:
            whose = "that sampled step" if restore == "step" else "of the evaluation at step"
            parts.append(f"restored the adapter and optimizer {whose} {self._kept[restore].step}")
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
