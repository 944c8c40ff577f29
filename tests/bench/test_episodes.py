"""What `scripts/bench/episodes.py` counts. The measurement is run by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from rankup.rollout.turns import Request, Turn


@pytest.fixture(scope="module")
def sides(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    return bench_module("episodes_sides")


def _turn(length: int, *, cached: int) -> Turn:
    return Turn(
        token_ids=(1,) * length,
        logprobs=(-1.0,) * length,
        text="",
        finish_reason="stop",
        ended_by_token=True,
        policy_version=0,
        cached_tokens=cached,
    )


def test_the_last_token_of_a_turn_is_not_computed_twice_but_all_others_outside_of_full_blocks_are(
    sides: ModuleType, bench_module: Callable[[str], ModuleType]
):
    # 70 tokens, then 20 sampled: 89 went through the model, 64 of them are in full blocks of 32. Then 15 are given.
    recorded = sides.Recorded(turns={0: [_turn(20, cached=0), _turn(5, cached=64)]}, prompts={0: [(1,) * 70, (1,) * 105]})
    assert [(before, length) for before, length, _ in recorded.later_turns()] == [(89, 105)]
    counted = bench_module("episodes")._computed_twice(recorded)
    assert counted["computed_twice"]["all"] == [25]
    assert counted["new_tokens_mean"] == 16
    assert counted["first_turn_computed_mean"] == 70


def test_a_replay_returns_each_turn_of_an_episode_once_in_its_order(sides: ModuleType):
    turns = [_turn(3, cached=0), _turn(4, cached=0)]
    replay, seen = sides.Replay(sides.Recorded(turns={5: turns})), []
    while len(seen) < 2:
        replay.submit(5, Request(prompt_token_ids=(1,), max_tokens=9, seed=None))
        seen += replay.step()
    assert seen == [(5, turns[0]), (5, turns[1])]
    assert not replay.has_unfinished
