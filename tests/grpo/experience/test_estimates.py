"""What an evaluation with several completions of each prompt says: pass@k, maj@n, and the intervals of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
from sample_groups import make_group

from rankup.grpo.algorithm.estimates import mean_interval, pass_at_k
from rankup.grpo.data.groups import Group
from rankup.grpo.experience.estimates import attempts, estimates_of, prompt_rewards
from rankup.rewards.combining import Scores


def group_of(rewards: Sequence[float | None], answers: Sequence[Any] | None = None) -> Group:
    """A prompt with a completion for each reward."""
    extras = {} if answers is None else {"extracted_answer": list(answers)}
    scores = Scores(list(rewards), {"score": list(rewards)}, extras, {}, [1.0])
    return dataclasses.replace(make_group([1], [[7]] * len(rewards)), scores=scores)


def test_one_completion_of_each_prompt_has_a_mean_and_its_interval_only():
    groups = [group_of([float(n % 2)]) for n in range(10)]
    estimates = estimates_of(groups, pass_reward=1.0)
    assert list(estimates) == ["reward"]
    interval = mean_interval([0.0, 1.0] * 5)
    assert (estimates["reward"].mean, estimates["reward"].low, estimates["reward"].high) == (0.5, interval.low, interval.high)


def test_several_completions_have_pass_at_k_and_the_majority():
    groups = [group_of([1.0, 0.0, 0.0, 1.0], "aabb"), group_of([0.0, 0.0, 0.5, 1.0], ["x", None, "x", "y"])]
    estimates = estimates_of(groups, pass_reward=1.0)
    assert list(estimates) == ["reward", "pass@1", "pass@2", "pass@4", "maj@4"]
    assert estimates["pass@1"].mean == (0.5 + 0.25) / 2
    assert estimates["pass@2"].mean == pytest.approx((pass_at_k(4, 2, 2) + pass_at_k(4, 1, 2)) / 2)
    assert estimates["pass@4"].mean == 1.0
    assert estimates["maj@4"].mean == pytest.approx((0.5 + 0.0) / 2)  # a tie of two answers that pass half the time; x wins
    assert all(one.low <= one.mean <= one.high for one in estimates.values())


def test_what_passes_is_set_by_its_reward():
    groups = [group_of([0.5, 0.2])]
    assert estimates_of(groups, pass_reward=0.5)["pass@1"].mean == 0.5
    assert estimates_of(groups, pass_reward=1.0)["pass@2"].mean == 0.0


def test_a_completion_without_a_reward_is_none_of_the_attempts():
    groups = [group_of([1.0, None, None]), group_of([0.0, 0.0, 0.0])]
    estimates = estimates_of(groups, pass_reward=1.0)
    assert estimates["pass@1"].mean == 0.5
    assert estimates["pass@2"].mean == 0.0, "the first prompt has one attempt"
    assert estimates["reward"].mean == 0.25 and prompt_rewards(groups) == [1.0, 0.0]


def test_without_any_reward_nothing_is_known():
    estimates = estimates_of([group_of([None, None])], pass_reward=1.0)
    assert all(math.isnan(one.mean) and math.isnan(one.low) and math.isnan(one.high) for one in estimates.values())
    assert prompt_rewards([group_of([None, None])]) == [None]


def test_the_majority_needs_the_answers_of_all_prompts():
    logged, silent = group_of([1.0, 0.0], "ab"), group_of([1.0, 0.0])
    assert "maj@2" not in estimates_of([logged, silent], pass_reward=1.0)
    assert "maj@2" in estimates_of([logged], pass_reward=1.0)
    lists = group_of([1.0, 1.0, 0.0], [[1, 2], [1, 2], {"a": 1}])
    assert estimates_of([lists], pass_reward=1.0)["maj@3"].mean == 1.0


@pytest.mark.parametrize(("count", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])
def test_the_attempts_are_powers_of_two_and_all(count: int, ks: list[int]):
    assert attempts(count) == ks
