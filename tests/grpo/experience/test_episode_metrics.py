"""Metrics of episodes, the stop when most of them are void, and the notes about void ones."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_episodes import TRACEBACK, VOID, call, completion_of, group_of, played

from rankup.grpo.common.errors import TrainingStoppedError
from rankup.grpo.data.groups import Group
from rankup.grpo.experience.batch import Batch
from rankup.grpo.experience.episode_metrics import episode_metrics
from rankup.grpo.experience.evaluation import Evaluation
from rankup.grpo.experience.outage import Outage
from rankup.grpo.experience.step_metrics import completion_metrics, reward_metrics, scored_shares
from rankup.rewards.combining import Scores
from rankup.rewards.config import RewardsConfig


@pytest.fixture
def groups() -> list[Group]:
    """Three episodes of which one is void, and a group of one that was cut off by the limit of turns."""
    calls = [call(), call(error="raised"), call("sub", error="unknown"), call(error="arguments"), call(None, error="malformed")]
    return [
        group_of(
            completion_of(played(turns=3, calls=calls, seconds=2.0, recomputed=21), sampled=4, given=6),
            completion_of(VOID, sampled=50, given=90),
            completion_of(played(turns=1), sampled=8, given=0, reason="done"),
            scores=Scores(
                total=[1.0, None, 0.0], by_function={"exact": [1.0, None, 0.0]}, extras={}, metrics={}, weights=[1.0]
            ),
        ),
        group_of(
            completion_of(played(turns=2, calls=[call(error="timeout")], seconds=10.0), sampled=6, given=3, reason="turns"),
            scores=Scores(total=[0.5], by_function={"exact": [0.5]}, extras={}, metrics={}, weights=[1.0]),
        ),
    ]


def test_metrics_of_tools_and_episodes(groups: list[Group]) -> None:
    assert episode_metrics(groups) == pytest.approx(
        {
            "tools/call_frequency": 6 / 4,
            "tools/failure_frequency": 5 / 6,
            "tools/unknown": 2 / 6,
            "tools/malformed": 1 / 6,
            "tools/timeout": 1 / 6,
            "episodes/failed": 1 / 4,
            "episodes/mean_turns": 2.0,
            "episodes/mean_given_tokens": 3.0,
            "episodes/mean_recomputed_tokens": 7.0,
            "episodes/tool_seconds": 4.0,
        }
    )


def test_they_are_the_same_from_the_metadata_of_other_workers(groups: list[Group]) -> None:
    remote = [
        dataclasses.replace(group, completions=tuple(c.metadata() for c in group.completions), is_local=False)
        for group in groups
    ]
    assert completion_metrics(remote) == completion_metrics(groups)
    assert reward_metrics(remote, ["exact"]) == reward_metrics(groups, ["exact"])


def test_completions_without_episodes_have_none_of_them() -> None:
    names = completion_metrics([group_of(completion_of(given=0))])
    assert not [name for name in names if name.startswith(("tools/", "episodes/"))]


def test_episodes_without_calls_have_failure_frequency_0_as_in_trl() -> None:
    metrics = episode_metrics([group_of(completion_of(played()))])
    assert metrics["tools/call_frequency"] == metrics["tools/failure_frequency"] == metrics["tools/unknown"] == 0.0


def test_lengths_count_sampled_tokens_of_episodes_that_are_not_void(groups: list[Group]) -> None:
    metrics = completion_metrics(groups)
    assert metrics["completions/mean_length"] == 6.0 and metrics["completions/max_length"] == 8.0
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3), "check 9: the limit of turns is one"
    assert metrics["completions/max_terminated_length"] == 8.0, "`done` is an end"


def test_void_episodes_are_in_no_reward_metric(groups: list[Group]) -> None:
    metrics = reward_metrics(groups, ["exact"])
    assert metrics["reward"] == metrics["rewards/exact/mean"] == 0.5
    assert "rewards/exact/none_ratio" not in metrics
    assert scored_shares(groups) == {"exact": 1.0}


def test_a_step_of_void_episodes_has_no_means() -> None:
    scores = Scores(total=[None], by_function={"exact": [None]}, extras={}, metrics={}, weights=[1.0])
    groups = [group_of(completion_of(VOID), scores=scores)]
    metrics = {**completion_metrics(groups), **reward_metrics(groups, ["exact"])}
    assert metrics["episodes/failed"] == 1.0
    for name in ("reward", "completions/mean_length", "completions/min_length", "completions/clipped_ratio"):
        assert math.isnan(metrics[name]), name
    assert math.isnan(metrics["episodes/mean_turns"])


def test_rewards_of_environments_have_metrics_by_their_names() -> None:
    scores = Scores(total=[1.0, 0.5], by_function={"Guess": [1.0, 0.5]}, extras={}, metrics={}, weights=[1.0])
    metrics = reward_metrics([group_of(completion_of(played()), completion_of(played()), scores=scores)], [])
    assert metrics["rewards/Guess/mean"] == 0.75


def test_an_evaluation_has_them_with_its_prefix(groups: list[Group]) -> None:
    metrics = Evaluation(groups=groups, seconds=1.0).metrics()
    assert metrics["eval_tools/call_frequency"] == 1.5 and metrics["eval_episodes/failed"] == 0.25


def test_an_evaluation_with_a_void_episode_is_no_evidence_about_the_policy(groups: list[Group]) -> None:
    assert not Evaluation(groups=groups, seconds=1.0).is_complete
    assert Evaluation(groups=[group.without_void() for group in groups], seconds=1.0).is_complete


# Void episodes stop a run


def batch_of(*episodes: object) -> Batch:
    completions = [completion_of(VOID if is_void else played()) for is_void in episodes]
    scores = Scores(
        total=[None if v else 1.0 for v in episodes], by_function={}, extras={}, metrics={}, weights=[]
    )
    groups = [group_of(*completions, scores=scores)]
    return Batch(groups=groups, trained=groups, metrics={}, rollout_seconds=0.0, reward_seconds=0.0)


def test_more_than_half_void_stops_the_run_with_the_last_traceback() -> None:
    outage = Outage(RewardsConfig(max_steps_without_reward=None))
    outage.stop_if_too_long(batch_of(True, False))
    outage.stop_if_too_long(batch_of(False, False))
    with pytest.raises(TrainingStoppedError, match=r"2 of 3 episodes are void") as stopped:
        outage.stop_if_too_long(batch_of(True, True, False))
    assert str(stopped.value).endswith(TRACEBACK)


@pytest.mark.parametrize("count", [1, 5])
def test_completions_without_episodes_never_stop_a_run(count: int) -> None:
    scores = Scores(total=[1.0] * count, by_function={}, extras={}, metrics={}, weights=[])
    groups = [group_of(*[completion_of(given=0)] * count, scores=scores)]
    batch = Batch(groups=groups, trained=groups, metrics={}, rollout_seconds=0.0, reward_seconds=0.0)
    Outage(RewardsConfig()).stop_if_too_long(batch)
