"""Guards: alarms on a run's numbers, and what follows: skip an update, halve the learning rate, roll back to a snapshot.

    guards = Guards(config.guards, snapshots)
    decision = guards.inspect(step, {"reward": 0.4, "grad_norm": 0.2, "entropy": 1.1})    # after backward, before the update
    guards.apply(decision)                                            # takes or restores a snapshot, if decided
    if decision.allows_update:
        optimizer.step()
    rate = schedule(step) * guards.learning_rate_factor

    decision = guards.inspect_evaluation(updates_done, rewards)       # between two steps
    guards.apply(decision)                                            # after a restore, publish the adapter

Steps count from 0; the texts add one. The rollouts of a step are sampled from the policy before that step's update. A snapshot
taken before the update therefore holds a policy whose reward was just measured.

A run that evaluates while it trains has a second kind of snapshot. An evaluation uses the same prompts each time, so its noise
can be estimated. It is more reliable than the training reward. The newest policy whose evaluation is the best, or not
distinguishable from it, is the snapshot. It is restored if a later evaluation has declined. The run ends with it if the last
evaluation is clearly worse.

There are three kinds of alarm. `batch`: the batch is unsuitable for an update, which is skipped beyond the hard limit.
`policy`: the policy has degraded; it is rolled back beyond the hard limit. `advice`: only shown. An alarm triggers when its
value crosses a limit, and once more if it then crosses the hard limit. It can trigger again after the value was inside for one
step (batch alarms), one evaluation, or five steps in a row (all others). Two triggers within a window halve the learning rate,
three roll the policy back.

A reward that is not known is no evidence (`evidence.py`): neither for an alarm nor for a snapshot.

Noise must not trigger an alarm. The reward counts as declined only beyond 3 standard errors. The gradient norm is compared with
its own variation, the sampler mismatch with its initial value. Otherwise healthy runs would be rolled back, mostly at low
success rates.

It is plain Python arithmetic (`trackers.py`, `evaluations.py`), and imports no torch. `rules.py` lists the alarms,
`config/guards.py` their limits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..config.guards import LOW_IS_BAD, GuardsConfig
from .decision import Decision, SnapshotKind, SnapshotStore
from .evaluations import AT_BEST, Evaluations, Rewards
from .evidence import Coverage, evidence
from .reading import clamped_exp, limits, read, read_evaluation, reward_is_at_best
from .rules import EVALUATION, RULES, Reading
from .trackers import Counters, Level, Series, TakenSnapshot, Trackers

QUIET_STEPS = 3
"""No snapshot is taken within this many steps after an alarm: a fault may show in one quantity before the others."""

SKIP_REMEDY = (
    "lower optim.learning_rate; if the sampler's gap is too wide, sample with top_p 1, top_k -1 and min_p 0, or test with "
    "`rankup check` whether vLLM samples from the trained adapter"
)
RESTORE_REMEDY = "lower optim.learning_rate, or raise guards.max_restores"


class Guards:
    """Inspects every step of a run and carries out what it decides. See the module's docstring."""

    def __init__(self, config: GuardsConfig, snapshots: SnapshotStore) -> None:
        self.config = config
        self._snapshots = snapshots
        self._trackers = Trackers()
        self._taken: dict[SnapshotKind, TakenSnapshot] = {}
        self._evaluations = Evaluations()
        self._counters = Counters()
        self._coverage = Coverage()
        self._evaluation_coverage = Coverage()

    @property
    def learning_rate_factor(self) -> float:
        """Factor of the schedule's learning rate: 1, or less after halvings."""
        return self._counters.learning_rate_factor

    def inspect(self, step: int, quantities: Mapping[str, float | None]) -> Decision:
        """Decide about the update of `step`, after its backward pass. Call it once a step, then `apply`.

        quantities: metrics by name; absent ones are not judged.
        """
        quantities = evidence(quantities, self._coverage)
        remark = self._coverage.note() if self.config.enabled else None
        readings = [read(rule, step, quantities, self._trackers, self.config) for rule in RULES] if self.config.enabled else []
        counted = [reading for reading in readings if reading.rule.kind != "advice"]
        restore, halve = self._count_triggers(step, counted, self._kind_to_restore())
        halved = halve and self._halve()
        reasons = [] if restore else self._reasons_to_skip(counted, quantities.get("grad_norm"))
        stop_reason = self._count_skip(bool(reasons)) or self._stop_reason(restore)
        if stop_reason and self._can_restore(self._kind_to_restore()):
            restore = self._kind_to_restore()
        is_measured = quantities.get("reward") is None or math.isfinite(quantities["reward"] or 0.0)
        healthy = self.config.enabled and is_measured and not restore and not reasons and self._is_healthy(step, counted)
        return Decision(
            step=step,
            alarms=tuple(reading.alarm for reading in readings if reading.alarm is not None),
            skip=bool(reasons),
            restore=restore,
            snapshot="step" if healthy else None,
            stop=bool(stop_reason),
            text=self._text(f"step {step + 1}", restore, reasons=reasons, halved=halved, stop_reason=stop_reason),
            remark=f"step {step + 1}: {remark}" if remark else "",
        )

    def inspect_evaluation(self, step: int, rewards: Rewards | None) -> Decision:
        """Decide about the policy after `step` updates by its evaluation. Call it between two steps, then `apply`.

        rewards: what `comparable` returns. An evaluation in which other prompts have a reward than in the first one is ignored.
        """
        if not self.config.enabled or rewards is None or not self._evaluations.accepts(rewards):
            return Decision(step=step)
        self._evaluations.add(rewards)
        reading = read_evaluation(step, rewards, self._evaluations, self._trackers, self.config)
        restore, halve = self._count_triggers(step, [reading], "evaluation")
        halved = halve and self._halve()
        stop_reason = self._stop_reason(restore)
        is_best = self._evaluations.is_at_best(rewards)
        if self.config.load_best_model_at_end:  # the snapshot is what the run may end with: no other than the best
            is_best = self._evaluations.lost(rewards, standard_errors=0) == 0
        healthy = self.config.restore and not restore and is_best
        return Decision(
            step=step,
            alarms=() if reading.alarm is None else (reading.alarm,),
            restore=restore,
            snapshot="evaluation" if healthy else None,
            stop=bool(stop_reason),
            text=self._text(f"step {step}", restore, halved=halved, stop_reason=stop_reason),
        )

    def comparable(self, rewards: Rewards, shares: Mapping[str, float]) -> Rewards | None:
        """The rewards of an evaluation, of the same prompts each time; None if a function scored far fewer than before.

        shares: of the completions, those that each reward function with a weight scored.
        """
        return None if self._evaluation_coverage.missing(shares) else rewards

    def apply(self, decision: Decision) -> None:
        """Take or restore the snapshot that was decided on."""
        if decision.restore is not None:
            self.restore(decision.restore)
        elif decision.snapshot is not None:
            self._snapshots.take(decision.snapshot, decision.step)
            self._taken[decision.snapshot] = TakenSnapshot(decision.step, copy.deepcopy(self._trackers))
            if decision.snapshot == "evaluation" and "step" in self._taken:
                self._taken["step"].is_evaluated = False  # they hold the same policy no more

    def restore(self, kind: SnapshotKind) -> int:
        """Restore a snapshot: adapter, optimizer and all running means are those of its step, which is returned.

        Halvings and totals stay; the window of recent alarms is cleared.
        """
        step = self._snapshots.restore(kind)
        taken = self._taken[kind]
        self._trackers = copy.deepcopy(taken.trackers)
        taken.restores += 1
        if kind == "evaluation":
            # The step snapshot may be newer than the decline that the evaluation found: replace it.
            self._snapshots.take("step", step)
            self._taken["step"] = TakenSnapshot(step, copy.deepcopy(taken.trackers), taken.restores, is_evaluated=True)
        elif taken.is_evaluated:  # the same policy: its restores are counted together
            self._taken["evaluation"].restores = taken.restores
        self._counters.triggers.clear()
        self._counters.restores += 1
        return step

    def reason_to_skip_iteration(self, step: int, grad_norm: float) -> str | None:
        """Decide about a further update within the step: None if it may be applied, else a note. The skip is counted."""
        reason = "the gradient is not finite" if not math.isfinite(grad_norm) else ""
        rule = next(rule for rule in RULES if rule.name == "grad_norm")
        series, (_, stop) = self._trackers.series.get(rule.metric, Series()), limits(rule, self._trackers, self.config)
        is_known = series.count >= self.config.baseline_steps and grad_norm > 0
        if not reason and self.config.enabled and self.config.skip and stop is not None and is_known:
            ratio = clamped_exp(math.log(grad_norm) - series.long)
            reason = f"grad_norm {grad_norm:.3g} is {ratio:.1f} times its running mean" if ratio > stop else ""
        self._counters.skipped_steps += bool(reason)
        return f"step {step + 1}: skipped a further update ({reason})" if reason else None

    def final_snapshot(self, rewards: Rewards | None = None) -> SnapshotKind | None:
        """The snapshot that the run should end with; None: the current policy. `rewards`: of the last evaluation.

        Among evaluations the best is known: the last one may be lower by one standard error and 5 % of the gain.
        With `load_best_model_at_end` it may not be lower at all.
        Without evaluations the training reward decides: it must have lost as much of its gain as triggers its alarm.
        """
        if rewards is not None and self._can_restore("evaluation"):
            if self.config.load_best_model_at_end and self._evaluations.accepts(rewards):
                return "evaluation" if self._evaluations.lost(rewards, standard_errors=0) > 0 else None
            is_judged = self.config.evaluation_watch is not None and self._evaluations.accepts(rewards)
            return "evaluation" if is_judged and self._evaluations.lost(rewards, standard_errors=1) > AT_BEST else None
        limit, reward = self.config.reward_watch, self._trackers.series.get("reward")
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
        """Everything that later decisions depend on, as plain data that JSON holds without loss."""
        return {
            "trackers": asdict(self._trackers),
            "taken": {kind: asdict(taken) for kind, taken in self._taken.items()},
            "evaluations": asdict(self._evaluations),
            "counters": asdict(self._counters),
            "coverage": [self._coverage.usual, self._evaluation_coverage.usual],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`, under the same configuration."""
        self._trackers = Trackers.from_dict(state["trackers"])
        self._taken = {kind: TakenSnapshot.from_dict(taken) for kind, taken in state["taken"].items()}
        self._evaluations = Evaluations(**copy.deepcopy(dict(state["evaluations"])))
        self._counters = Counters(**copy.deepcopy(dict(state["counters"])))
        of_steps, of_evaluations = state.get("coverage", ({}, {}))  # none in checkpoints of earlier versions
        self._coverage, self._evaluation_coverage = Coverage(dict(of_steps)), Coverage(dict(of_evaluations))

    # --------------------------------------------------------------------------------------------- deciding

    def _can_restore(self, kind: SnapshotKind) -> bool:
        return self.config.enabled and self.config.restore and kind in self._taken

    def _kind_to_restore(self) -> SnapshotKind:
        """Which snapshot a step restores: after an evaluation that has declined, no step snapshot can be trusted."""
        evaluation = self._trackers.excursions.get(EVALUATION.name)
        has_fallen = evaluation is not None and evaluation.worst > Level.INSIDE
        return "evaluation" if has_fallen and self._can_restore("evaluation") else "step"

    def _stop_reason(self, restore: SnapshotKind | None) -> str:
        """Why the run should stop after this restore; empty if it should not."""
        if restore is None or self._taken[restore].restores < self.config.max_restores:
            return ""
        times = "once" if self.config.max_restores == 1 else f"{self.config.max_restores} times"
        step = _shown(restore, self._taken[restore])
        return f"stopping: rolled back {times} to step {step} without recovering: {RESTORE_REMEDY}"

    def _count_triggers(
        self, step: int, readings: Sequence[Reading], kind: SnapshotKind
    ) -> tuple[SnapshotKind | None, bool]:
        """Count this step's triggered alarms; returns the snapshot to restore (`kind`, or None) and whether to halve."""
        triggered = [reading for reading in readings if reading.alarm is not None]
        if not triggered:
            return None, False
        counters = self._counters
        counters.alarms += len(triggered)
        counters.last_trigger = step
        # The three sampler alarms measure the same mismatch, so they count as one.
        distinct_metrics = {reading.rule.metric.partition("/")[0] for reading in triggered}
        recent = [earlier for earlier in counters.triggers if earlier > step - self.config.window_steps]
        counters.triggers = recent + [step] * len(distinct_metrics)
        policy_stops = any(reading.rule.kind == "policy" and reading.level == Level.STOP for reading in triggered)
        restore = self._can_restore(kind) and (policy_stops or len(counters.triggers) >= 3)
        return kind if restore else None, policy_stops or len(counters.triggers) >= 2

    def _halve(self) -> bool:
        """Halve the learning rate; returns False if that is switched off or the floor is reached."""
        counters, lowest = self._counters, self.config.min_learning_rate_factor
        if not self.config.halve or counters.learning_rate_factor <= lowest:
            return False
        counters.learning_rate_factor = max(lowest, counters.learning_rate_factor / 2)
        counters.halvings += 1
        return True

    def _reasons_to_skip(self, readings: Sequence[Reading], grad_norm: float | None) -> list[str]:
        """Why the batch is unsuitable for an update; empty if it is suitable."""
        if grad_norm is not None and not math.isfinite(grad_norm):  # such an update destroys the adapter, guarded or not
            return ["the gradient is not finite"]
        if not self.config.skip:
            return []
        beyond = [r.rule.name for r in readings if r.rule.kind == "batch" and r.level == Level.STOP]
        return [f"{name} is {'below' if name in LOW_IS_BAD else 'above'} its hard limit" for name in beyond]

    def _count_skip(self, skip: bool) -> str:
        """Why the run should stop; empty if it should not."""
        self._counters.skipped_steps += skip
        self._counters.consecutive_skips = self._counters.consecutive_skips + 1 if skip else 0
        if self._counters.consecutive_skips < self.config.max_consecutive_skips:
            return ""
        return f"stopping after {self._counters.consecutive_skips} skipped updates in a row: {SKIP_REMEDY}"

    def _is_healthy(self, step: int, readings: Sequence[Reading]) -> bool:
        """Whether to take a snapshot: no value outside its limits, reward near its best, the last snapshot old enough.

        Stricter than the alarms: a policy whose decline cannot yet be distinguished from noise must not become a snapshot.
        """
        last_trigger, reward = self._counters.last_trigger, self._trackers.series.get("reward")
        evaluation, taken = self._trackers.excursions.get(EVALUATION.name), self._taken.get("step")
        return (
            self.config.restore
            and all(reading.level == Level.INSIDE for reading in readings)
            and not self._entropy_has_dropped()
            and (evaluation is None or evaluation.worst == Level.INSIDE)
            and (last_trigger is None or step - last_trigger > QUIET_STEPS)
            and (taken is None or step - taken.step >= self.config.snapshot_steps)
            and (reward is None or reward.is_near_its_best())
        )

    def _entropy_has_dropped(self) -> bool:
        """Whether the entropy of this step alone is below the limit, though its mean is not yet."""
        series, watch = self._trackers.series.get("entropy"), self.config.entropy_watch
        if series is None or watch is None or series.count < self.config.baseline_steps or reward_is_at_best(self._trackers):
            return False
        return series.last < watch * series.start

    def _text(
        self,
        subject: str,
        restore: SnapshotKind | None,
        *,
        halved: bool,
        stop_reason: str,
        reasons: Sequence[str] = (),
    ) -> str:
        parts = []
        if restore is not None:
            origin = "before the update of step" if restore == "step" else "the evaluation after step"
            parts.append(f"restored adapter and optimizer state from {origin} {_shown(restore, self._taken[restore])}")
        if reasons:
            parts.append(f"skipped the update ({', '.join(reasons)})")
        if halved:
            parts.append(f"halved the learning rate (now {self.learning_rate_factor:g} of the schedule)")
        if stop_reason:
            parts.append(stop_reason)
        return f"{subject}: {', '.join(parts)}" if parts else ""


def _shown(kind: SnapshotKind, taken: TakenSnapshot) -> int:
    """The step that was sampled from the snapshot's policy, counted from 1; or the updates done before its evaluation."""
    return taken.step + 1 if kind == "step" else taken.step
