"""A user's functions on groups: what they get, which results are refused, and that all workers decide alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from user_functions_of_workers import GROUPS, call_in_a_group

from rankup.grpo.common.world import SINGLE_PROCESS
from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.experience.batch import with_advantages
from rankup.grpo.experience.user_functions import UserFunctions, filtered, user_advantages


def returning(result: Any) -> Callable[..., Any]:
    def mine(groups: Any) -> Any:
        return result

    return mine


# The groups have three completions each; the last one of the second group has no reward.
GOOD: list[Any] = [
    [[1, -1, 0.5], [2, -2, 0], [0, 0, 0]],
    np.array([[1, -1, 0.5], [2, -2, 0], [0, 0, 0]], dtype=np.float32),
    torch.tensor([[1, -1, 0.5], [2, -2, 0], [0, 0, 0]]),
    (np.array(row) for row in ([1, -1, 0.5], [2, -2, 0], [0, 0, 0])),
]


@pytest.mark.parametrize("result", GOOD, ids=["lists", "an array", "a tensor", "a generator"])
def test_advantages_are_taken_as_they_are(result: Any) -> None:
    rows = user_advantages(returning(result), GROUPS, SINGLE_PROCESS)
    assert rows == [(1.0, -1.0, 0.5), (2.0, -2.0, 0.0), (0.0, 0.0, 0.0)]
    assert {type(advantage) for row in rows for advantage in row} == {float}


ZEROS = [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "must return a list of numbers for each group: 'NoneType' object is not iterable"),
        ([0.0] * 3, "must return a list of numbers for each group: 'float' object is not iterable"),
        ([ZEROS, [0.0, None, 0.0], ZEROS], "must return a list of numbers for each group: float"),
        ([ZEROS, ZEROS], r"must return a list of numbers for each of the 3 groups \(got 2 lists\)"),
        ([ZEROS, ZEROS, [0.0, 0.0]], "2 advantages for 3 completions in group 2, whose rewards are"),
        ([[0.0, math.nan, 0.0], ZEROS, ZEROS], "the advantage of completion 1 is nan, not a finite number, in group 0"),
        ([[0.0, 0.0, -math.inf], ZEROS, ZEROS], "the advantage of completion 2 is -inf"),
        ([ZEROS, [1.0, 1.0, 1.0], ZEROS], r"completion 2 has no reward, so its advantage must be 0 \(got 1\) in group 1"),
    ],
)
def test_advantages_of_the_wrong_form_are_refused(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^<function returning.<locals>.mine in {__name__}>:? {message}"):
        user_advantages(returning(result), GROUPS, SINGLE_PROCESS)


def test_a_group_has_variance_if_any_advantage_is_not_zero() -> None:
    """Whatever its rewards: it is what the learner trains on."""
    rows = [[0.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    config = GRPOConfig(advantage_estimator=returning(rows))
    groups = with_advantages(GROUPS, config, UserFunctions.load(config))
    assert [group.has_variance for group in groups] == [False, True, False]
    assert [group.reward_std > 0 for group in groups] == [True, True, False], "it stays that of the rewards"


def test_a_function_cannot_change_the_order_of_the_groups() -> None:
    def sorts(groups: Any) -> list[list[float]]:
        groups.sort()
        return [ZEROS] * 3

    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'sort'"):
        user_advantages(sorts, list(GROUPS), SINGLE_PROCESS)


def test_a_filter_marks_groups() -> None:
    def long_prompt(group: Group) -> bool:
        return len(group.prompt.token_ids) > 1

    assert [group.passes_filter for group in filtered(long_prompt, GROUPS, SINGLE_PROCESS)] == [False, True, True]
    of_numpy: Any = lambda group: np.bool_(False)  # noqa: E731
    assert [group.passes_filter for group in filtered(of_numpy, GROUPS, SINGLE_PROCESS)] == [False] * 3


@pytest.mark.parametrize("result", [None, 1, 0.5, "yes", []])
def test_a_filter_that_returns_no_bool_is_refused(result: Any) -> None:
    with pytest.raises(ValueError, match=rf"mine in .*> must return True or False \(got {result!r}\)".replace("[", r"\[")):
        filtered(returning(result), GROUPS, SINGLE_PROCESS)


# ------------------------------------------------------------------------------------------------- several workers


@pytest.mark.slow
def test_the_worker_that_sampled_a_group_decides_about_it(tmp_path: Path) -> None:
    """Functions that look at texts give other results for metadata; all workers come to the same advantages and groups."""
    get_context("forkserver").set_forkserver_preload(["rankup.grpo.experience.batch"])
    arguments = (2, f"file://{tmp_path / 'rendezvous'}", str(tmp_path))
    start_processes(call_in_a_group, arguments, nprocs=2, start_method="forkserver")
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # otherwise it stays until the end of all tests
    workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = [(float(len(text)), 0.0, 0.0) for text in ("a", "bb", "ccc")]
    for rows, passing, is_local in workers:
        assert rows == expected
        assert passing == [False, True, True]
        assert sum(is_local) in (1, 2)


def metadata(group: Group) -> Group:
    return dataclasses.replace(group, completions=tuple(c.metadata() for c in group.completions), is_local=False)


def test_groups_of_other_workers_hold_prompts_rewards_and_lengths() -> None:
    def looks(groups: Sequence[Group]) -> list[list[float]]:
        seen.extend(groups)
        return [ZEROS] * 3

    seen: list[Group] = []
    user_advantages(looks, [*GROUPS[:2], metadata(GROUPS[2])], SINGLE_PROCESS)
    remote = seen[2]
    assert not remote.is_local and remote.prompt == GROUPS[2].prompt and remote.scores.total == GROUPS[2].scores.total
    assert [(c.num_tokens, c.finish_reason, c.text) for c in remote.completions] == [(2, "stop", "")] * 3
