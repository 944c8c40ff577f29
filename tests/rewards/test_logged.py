import datetime
import enum
import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scored import inputs, scorer_of

from rankup.rewards.contract import RewardError
from rankup.rewards.logged import logged_name, plain


class Kind(enum.IntEnum):
    GOOD = 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.array("x"), "x"),
        (torch.ones(2, requires_grad=True), [1.0, 1.0]),
        (torch.tensor(3), 3),
        (torch.zeros(1, dtype=torch.bfloat16), [0.0]),
        ({"a": np.arange(2), 3: {1.5}}, {"a": [0, 1], "3": [1.5]}),
        ((1, [None, "x"]), [1, [None, "x"]]),
        (Decimal("0.1"), 0.1),
        (Fraction(1, 4), 0.25),
        (Fraction(10**400), math.inf),
        (Kind.GOOD, 1),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (b"raw", "b'raw'"),
        ("half \ud800", "half ?"),
        (int, "<class 'int'>"),
    ],
)
def test_logged_values_become_plain(value: Any, expected: Any):
    result = plain(value)
    assert result == expected and type(result) is type(expected)
    json.dumps(result)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


@given(JSON)
def test_json_values_stay_as_they_are(value: Any):
    assert plain(value) == value


def test_names_of_the_run_get_the_name_of_the_function():
    assert logged_name("f", "words") == "words"
    assert logged_name("f", "judge/cost") == "judge/cost"
    for taken in ("reward", "step", "loss", "eval_reward", "eval_x", "rewards/f/mean", "completions/mean_length", "time/x"):
        assert logged_name("f", taken) == f"rewards/f/{taken}"
        assert logged_name("g", logged_name("f", taken)) not in (taken, logged_name("f", taken))


def test_two_functions_log_a_column_of_one_name():
    def first(completions, log_extra, **kwargs):
        log_extra("why", ["a"])
        return [0.0]

    def second(completions, log_extra, **kwargs):
        log_extra("why", ["b"])
        return [0.0]

    assert scorer_of([first, second]).score(inputs("x")).extras == {"why": ["a"], "second/why": ["b"]}


@pytest.mark.parametrize("values", ["abc", {"a": 1, "b": 2, "c": 3}, 3, None])
def test_a_column_that_is_no_list_is_refused(values: Any):
    def logs(completions, log_extra, **kwargs):
        log_extra("x", values)
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"log_extra\('x'\) in reward function 'logs': give a list with one value for each"):
        scorer_of(logs).score(inputs("a", "b", "c"))


def test_a_logged_list_is_a_copy():
    state: list[list[int]] = [[1]]

    def logs(completions, log_extra, **kwargs):
        log_extra("x", state)
        return [0.0]

    scores = scorer_of(logs).score(inputs("a"))
    state[0].append(2)
    assert scores.extras == {"x": [[1]]}
