"""Metrics and the completions table of a step, from real scores of a few groups."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.experience.batch import with_advantages
from rankup.grpo.experience.step_metrics import completion_metrics, completions_table, reward_metrics
from rankup.rewards.combining import Scores
from rankup.rewards.config import RewardsConfig
from rankup.rewards.contract import Inputs
from rankup.rewards.runner import Scorer
from rankup.rollout.types import Completion


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def shouts(completions: list[str], log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float | None]:
    """Does not apply to short texts; logs a metric always, and a column only where there is something to see."""
    upper = [sum(c.isupper() for c in text) for text in completions]
    log_metric("uppercase", sum(upper))
    if any(upper):
        log_extra("letters", upper)
    return [float(u) if len(text) > 1 else None for u, text in zip(upper, completions, strict=True)]


def completion(text: str, finish_reason: Any) -> Completion:
    ids = tuple(range(len(text)))
    return Completion(
        token_ids=ids, logprobs=(-1.0,) * len(text), text=text, finish_reason=finish_reason, policy_version=3
    )


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(RewardsConfig(weights=[1.0, 10.0]), [length, shouts])


@pytest.fixture
def groups(scorer: Scorer) -> list[Group]:
    """Two groups of two: rewards 2 + 0, 3 + 10 and 1, 4 + 0; the first and the third completion were cut off."""
    texts = [[("aa", "length"), ("bbB", "stop")], [("c", "abort"), ("dddd", "stop")]]
    scored = []
    for index, pairs in enumerate(texts):
        completions = tuple(completion(text, reason) for text, reason in pairs)
        scores = scorer.score(
            Inputs(
                prompts=["p"] * 2,
                completions=[c.text for c in completions],
                completion_ids=[list(c.token_ids) for c in completions],
            )
        )
        prompt = Prompt(content=f"prompt {index}", token_ids=(5, 6))
        scored.append(Group(prompt=prompt, completions=completions, scores=scores))
    return with_advantages(scored, GRPOConfig(scale_rewards="group"))


def test_reward_metrics(groups: list[Group], scorer: Scorer) -> None:
    assert reward_metrics(groups, scorer.names) == pytest.approx(
        {
            "reward": (2 + 13 + 1 + 4) / 4,
            "reward_std": (statistics.stdev([2, 13]) + statistics.stdev([1, 4])) / 2,
            "frac_reward_zero_std": 0.0,
            "advantage_scale": (statistics.stdev([2, 13]) + statistics.stdev([1, 4])) / 2,
            "rewards/length/mean": 2.5,
            "rewards/length/std": statistics.stdev([2, 3, 1, 4]),
            "rewards/shouts/mean": 1 / 3,  # over the three it applies to
            "rewards/shouts/std": statistics.stdev([0, 1, 0]),
            "rewards/shouts/none_ratio": 1 / 4,
            "uppercase": 0.5,
        }
    )


def test_groups_of_equal_rewards_are_counted(groups: list[Group], scorer: Scorer) -> None:
    rewards = [[1.0, 1.0], [0.0, 1.0]]
    rescored = [replace(g, scores=replace(g.scores, total=total)) for g, total in zip(groups, rewards, strict=True)]
    metrics = reward_metrics(with_advantages(rescored, GRPOConfig(scale_rewards="group")), scorer.names)
    assert metrics["advantage_scale"] == pytest.approx(statistics.stdev([0, 1])), "groups without variance do not count in it"
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward_std"] == pytest.approx(statistics.stdev([0, 1]) / 2)


def test_completion_metrics(groups: list[Group]) -> None:
    assert completion_metrics(groups) == {
        "completions/mean_length": 2.5,
        "completions/min_length": 1.0,
        "completions/max_length": 4.0,
        "completions/mean_terminated_length": 3.5,  # of the two that ended by themselves
        "completions/min_terminated_length": 3.0,
        "completions/max_terminated_length": 4.0,
        "completions/clipped_ratio": 0.5,
    }


def test_no_completion_ended_by_itself(groups: list[Group]) -> None:
    metrics = completion_metrics([Group(prompt=groups[0].prompt, completions=(completion("abc", "length"),))])
    assert (metrics["completions/mean_terminated_length"], metrics["completions/clipped_ratio"]) == (0.0, 1.0)


def test_given_tokens_have_no_logprob_in_the_table() -> None:
    episode = Completion(
        token_ids=(5, 6, 7, 8), logprobs=(-0.5, -0.25), text="", finish_reason="stop", policy_version=0, given=((1, 3),)
    )
    scores = Scores(total=[1.0], by_function={}, extras={}, metrics={}, weights=[])
    group = Group(prompt=Prompt(content="?", token_ids=(1,)), completions=(episode,), scores=scores, advantages=(0.0,))
    assert completions_table([group]).table["logprobs"] == [[-0.5, None, None, -0.25]]


def test_completions_table(groups: list[Group]) -> None:
    table = completions_table(groups)
    assert table.table == {
        "prompt": ["prompt 0", "prompt 0", "prompt 1", "prompt 1"],
        "completion_prefix": [""] * 4,
        "completion": ["aa", "bbB", "c", "dddd"],
        "completion_ids": [[0, 1], [0, 1, 2], [0], [0, 1, 2, 3]],
        "logprobs": [[-1.0] * 2, [-1.0] * 3, [-1.0], [-1.0] * 4],
        "advantage": [*groups[0].advantages, *groups[1].advantages],
        "reward": [2.0, 13.0, 1.0, 4.0],
        "finish_reason": ["length", "stop", "abort", "stop"],
        "num_tokens": [2, 3, 1, 4],
        "policy_version": [3] * 4,
    }
    assert table.rewards == {"length": [2.0, 3.0, 1.0, 4.0], "shouts": [0.0, 1.0, None, 0.0]}
    assert table.data == {}
    assert table.extras == {"letters": [0, 1, None, None]}, "a group whose function logged nothing has empty cells"
