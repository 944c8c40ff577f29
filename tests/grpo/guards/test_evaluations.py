"""Alarms on evaluation rewards: gains and losses, actions after a decline, and the policy with which a run ends."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from played_guards import Played, after_calm, triggered

from rankup.grpo.guards.evaluations import Evaluations, mean_reward
from rankup.grpo.guards.guards import Decision
from rankup.grpo.guards.trackers import Level


def right(count: int, *, of: int = 128) -> list[float | None]:
    """So many prompts right, always the same ones first."""
    return [float(index < count) for index in range(of)]


def evaluated(*counts: int) -> Evaluations:
    evaluations = Evaluations()
    for count in counts:
        evaluations.add(right(count))
    return evaluations


# Losses


def test_the_share_of_the_gain_that_is_lost():
    evaluations = evaluated(16, 80)
    assert evaluations.lost(right(80), standard_errors=0) == 0
    assert evaluations.lost(right(96), standard_errors=0) == 0
    assert evaluations.lost(right(48), standard_errors=0) == pytest.approx(0.5)
    assert evaluations.lost(right(16), standard_errors=0) == pytest.approx(1.0)


def test_noise_is_that_of_the_differences_prompt_by_prompt():
    evaluations = evaluated(16, 80)
    differences = [1.0] * 32 + [0.0] * 96
    noise = 2 * statistics.stdev(differences) / 128**0.5 * (1 + 4 / 127)
    assert evaluations.lost(right(48), standard_errors=2) == pytest.approx((0.25 - noise) / 0.5)
    other_prompts = list(reversed(right(48)))  # the same mean, but few prompts have the same reward
    assert 0 < evaluations.lost(other_prompts, standard_errors=2) < evaluations.lost(right(48), standard_errors=2)


def test_where_nothing_was_gained_a_fall_below_the_start_counts():
    evaluations = evaluated(64, 66)
    assert evaluations.lost(right(0), standard_errors=0) == pytest.approx(66 / 64, rel=0.01)
    assert evaluations.lost(right(0), standard_errors=2) > 0.8


@pytest.mark.parametrize("start", [[1.0, -1.0] * 64, [0.0] * 128], ids=["around 0", "all 0"])
def test_rewards_around_zero_have_no_share_to_lose(start: list[float | None]):
    evaluations = Evaluations()
    evaluations.add(start)
    a_little_worse = [(reward or 0.0) - 2 * (row < 8) for row, reward in enumerate(start)]
    assert 0 < evaluations.lost(a_little_worse, standard_errors=0) < 0.3
    assert evaluations.lost(a_little_worse, standard_errors=2) < 0.15


def test_an_evaluation_with_other_prompts_scored_is_not_accepted():
    evaluations = Evaluations()
    assert not evaluations.accepts([None, None]), "nothing is known"
    evaluations.add([None, 0.0, 0.0])
    assert evaluations.accepts([None, 1.0, 0.0])
    assert not evaluations.accepts([None, 1.0, None]) and not evaluations.accepts([0.0, 1.0, 0.0])
    assert mean_reward([None, 1.0, 0.0]) == 0.5 and math.isnan(mean_reward([None]))


def test_the_noise_margin_grows_with_the_number_of_evaluations():
    assert Evaluations().noise_margin == 2.0 == evaluated(*range(1)).noise_margin
    assert evaluated(*range(10)).noise_margin == pytest.approx(1 + math.sqrt(2 * math.log(10)))


def test_of_one_prompt_nothing_is_known():
    evaluations = Evaluations()
    evaluations.add([0.0])
    evaluations.add([1.0])
    assert evaluations.lost([0.0], standard_errors=2) == 0.0


@given(st.lists(st.lists(st.floats(-5, 5), min_size=6, max_size=6), min_size=1, max_size=6))
def test_the_best_has_lost_nothing_and_less_is_lost_with_noise_taken_off(rounds: list[list[float]]):
    evaluations = Evaluations()
    for rewards in rounds:
        evaluations.add(rewards)
    best = max(rounds, key=statistics.fmean)
    assert evaluations.lost(best, standard_errors=0) == pytest.approx(0, abs=1e-6)
    assert evaluations.best is not None and evaluations.is_at_best(evaluations.best)
    for rewards in rounds:
        assert 0 <= evaluations.lost(rewards, standard_errors=2) <= evaluations.lost(rewards, standard_errors=0)


# What follows


def test_the_newest_policy_at_its_best_has_the_snapshot():
    played = Played()
    healthy = []
    for count in (16, 50, 80, 79, 70, 82):
        played.steps(10)
        healthy.append(played.evaluate(right(count)).snapshot)
    assert healthy == ["evaluation"] * 4 + [None, "evaluation"]


def test_before_anything_is_gained_the_snapshot_does_not_slide_down():
    played = Played()
    assert [bool(played.evaluate(right(count)).snapshot) for count in (64, 66, 62, 66, 59)] == [True, True, False, True, False]


def test_an_outage_of_the_rewards_says_nothing():
    played = Played()
    for count in (16, 80):
        played.steps(10)
        played.evaluate(right(count))
    nothing: list[float | None] = [None] * 128
    partly: list[float | None] = [0.0, 0.0, *[None] * 126]
    assert played.evaluate(nothing) == played.evaluate(partly) == Decision(step=20)
    assert played.guards.final_snapshot(nothing) is None
    assert triggered([played.evaluate(right(20))]) == [("evaluation", Level.STOP)]


def test_after_a_fallen_evaluation_a_step_s_restore_goes_back_to_the_best_one():
    played = after_calm()
    for count in (16, 80):
        played.evaluate(right(count))
        played.steps(6)
    assert played.evaluate(right(55)).restore is None
    decisions = [v for _ in range(2) for v in [*played.steps(sampler_kl=0.02), *played.steps()]]
    (restored,) = [v for v in decisions if v.restore]
    assert restored.restore == "evaluation"
    assert "from the evaluation after step 26" in restored.text


def test_restores_of_one_policy_are_limited_across_snapshot_kinds():
    """Every restore is followed by a fall, now in the evaluation, now in the training reward."""
    played = after_calm(max_restores=3)
    for count in (16, 80):
        played.evaluate(right(count))
    restores = []
    for _ in range(8):
        restores += [v for v in [played.evaluate(right(0)), *played.steps(8, reward=0.0)] if v.restore]
    assert [v.stop for v in restores][:4] == [False, False, False, True]


def test_restoring_an_evaluation_replaces_the_step_snapshot_by_the_same_policy():
    played = after_calm()
    for count in (16, 80, 0):
        played.evaluate(right(count))
    state = played.guards.state_dict()["taken"]
    assert (state["evaluation"]["step"], state["step"]["step"]) == (20, 20)


def test_restores_of_a_step_do_not_count_for_a_later_evaluation_snapshot():
    played = after_calm()
    for count in (16, 80, 0, 80):  # restored at the third; the fourth takes a new snapshot
        played.evaluate(right(count))
    taken = played.guards.state_dict()["taken"]
    assert taken["evaluation"]["restores"] == 0 and taken["step"]["restores"] == 1
    played.guards.restore("step")
    assert played.guards.state_dict()["taken"]["evaluation"]["restores"] == 0, "that snapshot was never restored"


def test_a_fall_above_the_hard_limit_restores_the_best_and_halves():
    played = Played()
    for count in (16, 80):
        played.steps(10)
        played.evaluate(right(count))
    played.steps(10)
    decision = played.evaluate(right(30))
    assert triggered([decision]) == [("evaluation", Level.STOP)]
    assert decision.restore == "evaluation" and not decision.snapshot and not decision.skip
    restored = "restored adapter and optimizer state from the evaluation after step 20"
    assert decision.text == f"step 30: {restored}, halved the learning rate (now 0.5 of the schedule)"
    assert decision.alarms[0].text.startswith("step 30: evaluation 0.234: ")
    state = played.guards.state_dict()
    assert state["trackers"] == state["taken"]["evaluation"]["trackers"] == state["taken"]["step"]["trackers"]
    assert (played.metric("alarms"), played.metric("restores"), played.metric("halvings")) == (1, 1, 1)
    played.steps(10)
    assert triggered([played.evaluate(right(80))]) == []


def test_a_fall_that_is_watched_adds_up_with_other_alarms_and_bars_snapshots():
    played = after_calm()
    for count in (16, 80):
        played.evaluate(right(count))
        played.steps(2)
    played.evaluate(right(55))
    assert triggered(played.decisions[-1:]) == [("evaluation", Level.WATCH)]
    assert played.guards.learning_rate_factor == 1.0
    assert not any(decision.snapshot for decision in played.steps(15))
    played.steps(1, sampler_kl=0.02)
    assert played.guards.learning_rate_factor == 0.5
    played.evaluate(right(80))
    assert any(decision.snapshot for decision in played.steps(8))


@pytest.mark.parametrize(("prompts", "count"), [(16, 50), (64, 50), (200, 50)])
def test_noise_is_seldom_a_fall(prompts: int, count: int):
    """A policy that does not change, whose prompts flip in one of five evaluations: hardly a run is restored, none ends."""
    restored = ended = 0
    for seed in range(20):
        draw, played = random.Random(seed), Played()
        usual = [float(draw.random() < 0.3) for _ in range(prompts)]
        for _ in range(count):
            played.evaluate([1 - right if draw.random() < 0.2 else right for right in usual])
        restored += any(decision.restore for decision in played.decisions)
        ended += any(decision.stop for decision in played.decisions)
    assert restored <= 2 and ended == 0


def test_an_evaluation_that_nothing_leads_on_from_ends_the_run():
    played = Played()
    for count in (16, 80):
        played.steps(5)
        played.evaluate(right(count))
    gave_up = []
    for _ in range(5):
        played.steps(5)
        gave_up.append(played.evaluate(right(0)).stop)
    assert gave_up == [False] * 4 + [True]
    assert "rolled back 4 times to step 10 without recovering" in played.decisions[-1].text


def test_switches():
    falls = (16, 80, 0)
    never = Played(restore=False)
    assert [never.evaluate(right(count)).restore for count in falls] == [None] * 3
    assert triggered(never.decisions) == [("evaluation", Level.STOP)]
    unhalved, off, unlimited = Played(halve=False), Played(enabled=False), Played(evaluation_watch=None, evaluation_stop=None)
    assert [unhalved.evaluate(right(count)).restore for count in falls] == [None, None, "evaluation"]
    assert unhalved.guards.learning_rate_factor == 1.0
    for count in falls:
        off.evaluate(right(count))
        unlimited.evaluate(right(count))
    assert not any(decision.alarms or decision.snapshot or decision.text for decision in off.decisions)
    assert triggered(unlimited.decisions) == []
    assert off.guards.final_snapshot(right(0)) is None


# The end


def test_the_run_ends_with_the_best_evaluation_unless_the_last_is_at_its_best():
    played = after_calm()
    for count in (16, 80):
        played.evaluate(right(count))
    assert played.guards.final_snapshot(right(80)) is None
    assert played.guards.final_snapshot(right(75)) is None  # 0.08 of the gain, half of which noise explains
    assert played.guards.final_snapshot(right(70)) == "evaluation"  # 0.16
    assert Played().guards.final_snapshot(right(3)) is None
    unlimited = Played(evaluation_watch=None, evaluation_stop=None)
    for count in (16, 80):
        unlimited.evaluate(right(count))
    assert unlimited.guards.final_snapshot(right(0)) is None


def test_with_load_best_model_at_end_noise_is_no_excuse():
    played = after_calm(load_best_model_at_end=True)
    taken = [played.evaluate(right(count)).snapshot for count in (16, 80, 79, 80, 78)]
    assert taken == ["evaluation", "evaluation", None, "evaluation", None]  # of two equal ones the later is the best
    assert played.guards.final_snapshot(right(80)) is None
    assert played.guards.final_snapshot(right(79)) == "evaluation"


def test_evaluations_outrank_the_training_reward_at_the_end():
    played = after_calm(reward_stop=None)
    played.evaluate(right(80))
    played.steps(15, reward=0.1)
    assert played.guards.final_snapshot() == "step"
    assert played.guards.final_snapshot(right(80)) is None


def test_evaluations_resume_from_a_checkpoint():
    undisturbed = Played()
    for count in (16, 80, 70):
        undisturbed.steps(7)
        undisturbed.evaluate(right(count))
    resumed = Played()
    resumed.guards.load_state_dict(json.loads(json.dumps(undisturbed.guards.state_dict(), allow_nan=False)))
    resumed.step, resumed.snapshots.steps = undisturbed.step, dict(undisturbed.snapshots.steps)
    for played in (undisturbed, resumed):
        played.steps(7)
        played.evaluate(right(20))
    assert resumed.decisions[-1] == undisturbed.decisions[-1]
    assert resumed.guards.state_dict() == undisturbed.guards.state_dict()
