"""The reward of `scripts/bench/vs_trl.py`. The comparison is run by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

Score = Callable[..., list[float]]


@pytest.fixture(scope="module")
def score(bench_module: Callable[[str], ModuleType]) -> Score:
    """The reward function of the benchmark."""
    return bench_module("vs_trl").score_by_hash


completions = st.lists(st.integers(0, 49_151), min_size=1, max_size=32)


@given(st.lists(completions, min_size=2, max_size=8, unique_by=tuple))
def test_reward_varies_within_any_group_of_distinct_completions(score: Score, group: Sequence[list[int]]):
    rewards = score(prompts=["p"] * len(group), completions=["c"] * len(group), completion_ids=group)
    assert len(set(rewards)) == len(group)
    assert all(0.0 <= reward < 1.0 for reward in rewards)


@given(completions)
def test_reward_depends_only_on_the_tokens(score: Score, ids: list[int]):
    once, again = score(completion_ids=[ids, list(ids)], trainer_state=object())
    assert once == again
    assert score(completion_ids=[tuple(ids)]) == [once]


def test_reward_distinguishes_tokens_with_the_same_digits(score: Score):
    assert len(set(score(completion_ids=[[1, 23], [12, 3], [123], [1, 2, 3]]))) == 4
