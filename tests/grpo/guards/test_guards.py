"""Each alarm triggers on its fault and only on it, and actions follow."""

from __future__ import annotations

import math

import pytest
from played_guards import Played, StepsOnly, after_calm, rise, triggered

from rankup.grpo.config.guards import GuardsConfig
from rankup.grpo.guards.decision import Decision
from rankup.grpo.guards.guards import Guards
from rankup.grpo.guards.rules import EVALUATION, RULES
from rankup.grpo.guards.trackers import Level


@pytest.fixture
def calm() -> Played:
    """After twenty calm steps: starts and running means are known."""
    return after_calm()


# Alarms

FAULTS = [
    ("sampler_kl", 0.009, 0.02, 0.2),
    ("sampler_ratio", 1.049, 1.1, 1.3),
    ("effective_sample_size", 0.6, 0.4, 0.2),
    ("grad_norm", 0.5, 0.8, 1.2),
    ("entropy", 0.6, 0.3, 0.01),
    ("advantage_scale", 0.5, 2.0, None),
    ("length", 180.0, 400.0, None),
    ("reward", 0.45, 0.35, 0.0),
    ("zero_variance", 0.7, 1.0, None),
]


@pytest.mark.parametrize(("name", "harmless", "watch", "stop"), FAULTS)
def test_each_alarm_triggers_on_its_fault_and_on_no_other(name: str, harmless: float, watch: float, stop: float | None):
    levels: dict[float, Level] = {harmless: Level.INSIDE, watch: Level.WATCH}
    if stop is not None:
        levels[stop] = Level.STOP
    for value, level in levels.items():
        played = Played(restore=False)
        assert triggered(played.steps(20)) == []
        alarms = triggered(played.steps(25, **{name: value}))
        assert {alarm for alarm, _ in alarms} == ({name} if level > Level.INSIDE else set())
        assert max((reached for _, reached in alarms), default=Level.INSIDE) == level


@pytest.mark.parametrize(("name", "watch", "stop"), [(name, watch, stop) for name, _, watch, stop in FAULTS])
def test_a_limit_can_be_switched_off(name: str, watch: float, stop: float | None):
    limits = {f"{name}_watch": None} | ({} if stop is None else {f"{name}_stop": None})
    played = Played(**limits)
    played.steps(20)
    assert triggered(played.steps(25, **{name: watch if stop is None else stop})) == []


@pytest.mark.parametrize("name", ["sampler_kl", "sampler_ratio", "effective_sample_size", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_batch_is_above_the_hard_limit(calm: Played, name: str, value: float):
    (decision,) = calm.steps(**{name: value})
    assert triggered([decision]) == [(name, Level.STOP)]
    assert decision.skip
    assert "not finite" in decision.alarms[0].text
    assert triggered(calm.steps(3)) == []  # no running mean took it in


@pytest.mark.parametrize("name", ["reward", "entropy", "advantage_scale", "length", "zero_variance"])
@pytest.mark.parametrize("value", [math.nan, None])
def test_metrics_without_information_on_the_policy_are_ignored(calm: Played, name: str, value: float | None):
    assert triggered(calm.steps(10, **{name: value}) + calm.steps(10)) == []


def test_absent_quantities_are_not_judged():
    guards = Guards(GuardsConfig(), StepsOnly())
    assert all(guards.inspect(step, {}).alarms == () for step in range(30))


def test_alarms_that_need_a_baseline_are_silent_without_one():
    played = Played()
    first = played.steps(4)
    fifth = played.steps(1, sampler_kl=0.02, entropy=0.01, length=900.0, grad_norm=5.0, reward=0.0)
    assert triggered(first + fifth) == []


def test_a_sampler_with_a_large_gap_triggers_only_above_its_baseline():
    played = Played()
    assert triggered(played.steps(30, sampler_kl=0.03, sampler_ratio=1.1)) == []
    assert triggered(played.steps(sampler_kl=0.07, sampler_ratio=1.16)) == [
        ("sampler_kl", Level.WATCH),
        ("sampler_ratio", Level.WATCH),
    ]


def test_a_norm_with_large_variance_triggers_later():
    played = Played()
    for step in range(40):
        played.steps(grad_norm=0.2 * 2 ** (0.5 * (-1) ** step))
    assert triggered(played.decisions) == []
    assert triggered(played.steps(grad_norm=1.2)) == []  # six times the mean
    assert triggered(played.steps(grad_norm=20.0)) == [("grad_norm", Level.STOP)]


def test_a_spike_of_the_norm_hides_neither_itself_nor_the_next(calm: Played):
    assert calm.steps(grad_norm=50.0)[0].skip
    assert not any(decision.skip for decision in calm.steps(3))
    assert calm.steps(grad_norm=50.0)[0].skip


def test_a_new_level_of_the_norm_is_accepted_before_the_run_gives_up(calm: Played):
    decisions = calm.steps(20, grad_norm=1.6)
    assert decisions[0].skip and not decisions[9].skip and not decisions[19].skip
    assert not any(decision.stop for decision in decisions)


def test_an_alarm_triggers_once_per_excursion():
    calm = after_calm(restore=False)  # a restore would reset the statistics
    assert triggered(calm.steps(3, sampler_kl=0.02)) == [("sampler_kl", Level.WATCH)]
    assert triggered(calm.steps(2, sampler_kl=0.2)) == [("sampler_kl", Level.STOP)]
    assert triggered(calm.steps(2, sampler_kl=0.02)) == []
    calm.steps()
    assert triggered(calm.steps(2, sampler_kl=0.02)) == [("sampler_kl", Level.WATCH)]


def test_a_mean_has_to_be_inside_for_some_steps_before_it_triggers_again():
    played = after_calm(restore=False)
    assert triggered(played.steps(20, entropy=0.3)) == [("entropy", Level.WATCH)]
    # The mean swings around the limit.
    swings = [played.steps(3, entropy=0.8) + played.steps(3, entropy=0.3) for _ in range(6)]
    assert triggered([decision for swing in swings for decision in swing]) == []
    played.steps(10)
    assert triggered(played.steps(20, entropy=0.3)) == [("entropy", Level.WATCH)]


# What a reward excuses, and what noise does


def test_entropy_and_advantage_scale_are_held_back_while_the_reward_is_at_its_best():
    played = Played()
    assert triggered(rise(played) + played.steps(40, reward=0.8, entropy=0.05, advantage_scale=2.0)) == []


def test_length_is_not_held_back():
    assert ("length", Level.WATCH) in triggered(rise(Played(), length=400.0))


def test_entropy_triggers_without_a_reward_gain(calm: Played):
    assert ("entropy", Level.STOP) in triggered(calm.steps(20, entropy=0.01))


def test_entropy_is_no_longer_held_back_once_the_reward_falls():
    played = Played()
    rise(played)
    alarms = triggered(played.steps(10, reward=0.2, entropy=0.05))
    assert {"reward", "entropy"} <= {name for name, _ in alarms}


def test_the_reward_alarm_measures_the_lost_share_of_the_gain():
    played = Played(restore=False, halve=False)
    rise(played)
    played.steps(40, reward=0.8)
    assert triggered(played.steps(30, reward=0.72)) == []  # 0.11 of the gain
    assert triggered(played.steps(30, reward=0.64)) == [("reward", Level.WATCH)]  # 0.23
    assert triggered(played.steps(40, reward=0.5)) == [("reward", Level.STOP)]


def test_a_rare_reward_that_comes_and_goes_is_no_loss():
    played = Played()
    for step in range(400):
        played.steps(reward=0.125 if step % 57 == 20 else 0.0, advantage_scale=None, entropy=None)
    assert triggered(played.decisions) == []


# Actions


def test_one_alarm_does_nothing_and_two_halve_the_learning_rate(calm: Played):
    (first,) = calm.steps(sampler_kl=0.02)
    assert (first.text, calm.guards.learning_rate_factor) == ("", 1.0)
    calm.steps()
    (second,) = calm.steps(sampler_kl=0.02)
    assert (second.skip, second.restore, calm.guards.learning_rate_factor) == (False, None, 0.5)
    assert second.text == "step 23: halved the learning rate (now 0.5 of the schedule)"


def test_a_third_alarm_restores_and_halves_again_and_empties_the_window(calm: Played):
    for _ in range(3):
        calm.steps()
        calm.steps(sampler_kl=0.02)
    decision = calm.decisions[-1]
    assert decision.restore and not decision.skip and not decision.snapshot
    restored = "restored adapter and optimizer state from before the update of step 21"
    assert decision.text == f"step 26: {restored}, halved the learning rate (now 0.25 of the schedule)"
    assert (calm.metric("restores"), calm.metric("halvings"), calm.metric("alarms")) == (1, 2, 3)
    calm.steps()
    calm.steps(sampler_kl=0.02)
    assert calm.guards.learning_rate_factor == 0.25


@pytest.mark.parametrize(("apart", "factor"), [(19, 0.5), (20, 1.0)])
def test_alarms_add_up_within_the_window_only(calm: Played, apart: int, factor: float):
    calm.steps(sampler_kl=0.02)
    calm.steps(apart - 1)
    calm.steps(sampler_kl=0.02)
    assert calm.guards.learning_rate_factor == factor


def test_the_sampler_s_alarms_of_one_step_count_as_one(calm: Played):
    (decision,) = calm.steps(sampler_kl=0.02, sampler_ratio=1.1, effective_sample_size=0.4)
    assert len(decision.alarms) == 3
    assert calm.guards.learning_rate_factor == 1.0
    (decision,) = calm.steps(grad_norm=0.8)
    assert calm.guards.learning_rate_factor == 0.5


def test_advice_is_shown_and_nothing_follows(calm: Played):
    decisions = calm.steps(60, zero_variance=1.0)
    assert triggered(decisions) == [("zero_variance", Level.WATCH)]
    assert calm.metric("alarms") == 0 and all(decision.text == "" for decision in decisions)
    assert sum(decision.snapshot is not None for decision in decisions) == 12


def test_batches_above_the_hard_limit_are_skipped(calm: Played):
    decisions = calm.steps(4, sampler_kl=0.2)
    assert all(decision.skip and not decision.snapshot for decision in decisions)
    assert triggered(decisions) == [("sampler_kl", Level.STOP)]
    assert decisions[3].text == "step 24: skipped the update (sampler_kl is above its hard limit)"
    assert not calm.steps()[0].skip
    assert calm.metric("skipped_steps") == 4


def test_a_policy_above_the_hard_limit_is_restored_immediately(calm: Played):
    decisions = calm.steps(12, reward=0.0)
    (restored,) = [decision for decision in decisions if decision.restore][:1]
    assert triggered([restored]) == [("reward", Level.STOP)]
    origin = "restored adapter and optimizer state from before the update of step 16"
    assert restored.text.endswith(f"{origin}, halved the learning rate (now 0.5 of the schedule)")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_that_is_not_finite_is_always_skipped(enabled: bool):
    played = Played(enabled=enabled, skip=False)
    played.steps(10)
    (decision,) = played.steps(grad_norm=math.nan)
    assert decision.skip and decision.text == "step 11: skipped the update (the gradient is not finite)"


def test_switches():
    assert not any(v.skip for v in after_calm(skip=False).steps(5, sampler_kl=0.2))
    assert not any(v.restore for v in after_calm(restore=False).steps(20, reward=0.0))
    unhalved = after_calm(halve=False)
    assert any(v.restore for v in unhalved.steps(20, reward=0.0))
    assert unhalved.guards.learning_rate_factor == 1.0
    off = after_calm(enabled=False)
    assert all(v == Decision(step=v.step) for v in off.steps(20, reward=0.0, sampler_kl=0.2, grad_norm=90.0, entropy=0.0))


def test_without_a_snapshot_a_bad_policy_only_halves():
    played = Played()
    played.steps(20, sampler_kl=0.2)  # all skipped: never healthy
    decisions = played.steps(20, sampler_kl=0.2, reward=0.0)
    assert not any(decision.restore for decision in decisions)
    assert played.guards.learning_rate_factor < 1


def test_the_run_gives_up_after_too_many_skips_in_a_row():
    calm = after_calm(restore=False)
    decisions = calm.steps(9, sampler_kl=0.2) + calm.steps() + calm.steps(9, grad_norm=math.inf)
    assert not any(decision.stop for decision in decisions)
    (last,) = calm.steps(sampler_kl=0.2)
    assert last.stop and "after 10 skipped updates in a row" in last.text


def test_the_learning_rate_has_a_floor():
    played = after_calm(restore=False, min_learning_rate_factor=0.2)
    for _ in range(12):
        played.steps()
        played.steps(sampler_kl=0.02)
    assert played.guards.learning_rate_factor == 0.2
    assert played.metric("halvings") == 3
    assert played.decisions[-1].text == ""


def test_every_text_is_one_line_that_names_step_value_and_limit(calm: Played):
    (alarm,) = calm.steps(effective_sample_size=0.2)[0].alarms
    assert alarm.text == "step 21: effective_sample_size 0.20 (below its hard limit of 0.3)"
    assert (alarm.step, alarm.value, alarm.limit) == (21, 0.2, 0.3)
    calm.steps(3, sampler_kl=math.nan, grad_norm=9.0, entropy=0.001, reward=-1.0, length=900.0, advantage_scale=9.0)
    texts = [alarm.text for decision in calm.decisions for alarm in decision.alarms] + [v.text for v in calm.decisions]
    assert len(texts) > 5 and all("\n" not in text and "{" not in text for text in texts)


# Configuration


def test_limits_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"must not be below guards\.grad_norm_watch, which is 3 \(got 2\)"):
        GuardsConfig(grad_norm_stop=2.0)
    with pytest.raises(ValueError, match=r"must not be above guards\.entropy_watch, which is 0\.5 \(got 0\.6\)"):
        GuardsConfig(entropy_stop=0.6)


def test_every_rule_has_its_limits():
    config = GuardsConfig()
    assert all(config.limits(rule.name) != (None, None) for rule in RULES)
    names = {name.rpartition("_")[0] for name in GuardsConfig.model_fields if name.endswith(("_watch", "_stop"))}
    assert names == {rule.name for rule in (*RULES, EVALUATION)}


def test_a_snapshot_that_nothing_leads_on_from_ends_the_run() -> None:
    """Every restore is followed by the same fall; four are carried out, the fifth stops the run, restored as well."""
    played = after_calm()
    decisions = [v for _ in range(5) for v in played.steps(12, reward=0.0)]
    restores = [v for v in decisions if v.restore]
    assert [v.stop for v in restores[:5]] == [False] * 4 + [True]
    assert "without recovering" in restores[4].text and "max_restores" in restores[4].text


def test_a_new_snapshot_forgives_restores_of_the_one_before() -> None:
    played = after_calm()
    for _ in range(8):
        assert not any(decision.stop for decision in played.steps(12, reward=0.0)[:6])
        played.steps(20)
    assert played.metric("restores") >= 5
