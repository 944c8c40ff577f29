"""Steps and evaluations in which a reward function gave fewer rewards than usual are no evidence about the policy."""

import json
import math

from played_guards import Played

from rankup.grpo.guards.evidence import Coverage, evidence, scored_shares
from rankup.grpo.guards.guards import Guards

TWO = {"reward": 1.5, "rewards/judge/mean": 1.0, "rewards/format/mean": 0.5}


def test_a_function_is_missing_where_it_scores_less_than_half_of_the_usual():
    coverage = Coverage()
    assert coverage.missing({"judge": 1.0, "rare": 0.0}) == []
    assert coverage.missing({"judge": 0.6, "rare": 0.1}) == []
    for _ in range(50):  # an outage never becomes usual
        assert coverage.missing({"judge": 0.1, "rare": 0.0}) == ["judge"]
    assert coverage.missing({"judge": 1.0, "rare": 0.3}) == []


def test_a_function_that_never_gave_rewards_is_not_missing():
    coverage = Coverage()
    assert all(coverage.missing({"logs_only": 0.0}) == [] for _ in range(30))


def test_the_reward_without_a_function_is_not_judged():
    coverage = Coverage()
    assert evidence(TWO, coverage)["reward"] == 1.5
    outage = {"reward": 0.5, "rewards/judge/mean": math.nan, "rewards/judge/none_ratio": 1.0, "rewards/format/mean": 0.5}
    assert scored_shares(outage) == {"judge": 0.0, "format": 1.0}
    judged = evidence({**outage, "advantage_scale": 0.1, "entropy": 2.0}, coverage)
    assert math.isnan(judged["reward"] or 0) and math.isnan(judged["advantage_scale"] or 0) and judged["entropy"] == 2.0


def test_what_guards_ignore_is_noted_once_for_each_outage():
    coverage = Coverage()
    notes = []
    for share in (1.0, 0.25, 0.0, 1.0, 1.0, 0.0):
        coverage.missing({"judge": share, "format": 1.0})
        notes.append(coverage.note())
    first = "guards ignore the reward until this is over: judge scores 25% of the completions, usually 100%"
    assert notes == [None, first, None, None, None, first.replace("25%", "0%")]


def test_completions_on_which_a_function_failed_are_not_judged():
    assert evidence({**TWO, "reward": 0.2, "reward_without_failures": 1.5}, Coverage())["reward"] == 1.5


def test_no_snapshot_is_taken_of_a_policy_whose_reward_is_not_known():
    played = Played(snapshot_steps=1)
    played.steps(10)
    assert played.steps(1)[0].snapshot == "step"
    assert [decision.snapshot for decision in played.steps(5, reward=math.nan)] == [None] * 5
    assert played.steps(1)[0].snapshot == "step"


def test_an_evaluation_without_a_function_is_not_comparable_also_after_resuming():
    played = Played()
    assert played.guards.comparable([1.5], {"judge": 1.0, "format": 1.0}) == [1.5]
    resumed = Guards(played.guards.config, played.snapshots)
    resumed.load_state_dict(json.loads(json.dumps(played.guards.state_dict())))
    assert resumed.comparable([0.5], {"judge": 0.0, "format": 1.0}) is None
    assert resumed.comparable([1.4], {"judge": 1.0, "format": 1.0}) == [1.4]
    state = played.guards.state_dict()
    del state["coverage"]  # of an earlier version
    resumed.load_state_dict(state)
