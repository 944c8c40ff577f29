"""Rows that reward functions or records cannot use are refused before a run starts, by row, column and reason."""

import datetime
import threading
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from scored import scorer_of

from rankup.grpo.data import row_checks
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.data.row_checks import check_rows
from rankup.rewards.config import RewardFunction
from rankup.rewards.contract import with_check


def prompts(column: str, *values: Any, eval_set: str | None = None) -> list[Prompt]:
    """Prompts whose rows in the source are 10, 11, ..."""
    return [Prompt("?", (1,), {column: value}, eval_set, row=10 + index) for index, value in enumerate(values)]


def anything(completions, **kwargs):
    return [0.0] * len(completions)


class Item:
    pass


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize("isolation", ["inline", "process"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda text: True, "TypeError: a value of type function"),
        ({(1, 2): "x"}, "TypeError: keys must be str"),
        (Item(), "TypeError: a value of type Item"),
        ([threading.Lock()], "TypeError: a value of type lock"),
        (datetime.date(2024, 1, 1), "TypeError: a value of type date"),
        (np.arange(3), "TypeError: a value of type ndarray"),
        ({1, 2}, "TypeError: a value of type set"),
        (CYCLE, "ValueError: Circular reference"),
        (DEEP, "RecursionError"),
    ],
)
def test_a_column_that_json_cannot_hold_is_refused_by_row_and_column(value: Any, reason: str, isolation: str):
    scorer = scorer_of(anything, isolation=isolation)
    with pytest.raises(
        ValueError, match=rf"(?s)^row 11 of the training data: column 'x' cannot be recorded \({reason}.*Use text"
    ):
        check_rows(scorer, prompts("x", 1, value), "training data")


class Local(str):
    """Text to JSON; pickle refuses it."""

    def __reduce__(self) -> Any:
        raise TypeError("not to be copied")


def test_a_column_that_pickle_cannot_hold_is_refused_where_it_is_sent_to_processes():
    check_rows(scorer_of(anything), prompts("x", Local("a")), "training data")
    message = r"row 10 of the training data: column 'x' cannot be sent to the processes of reward functions: TypeError.*inline"
    with pytest.raises(ValueError, match=message):
        check_rows(scorer_of(anything, isolation="process"), prompts("x", Local("a")), "training data")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        10**30,
        0.5,
        float("nan"),
        "text \ud800",
        [],
        {},
        [1, ["a", None]],
        {"a": {"b": [1.5]}},
        (1, 2),
        b"x",
        Decimal("1.5"),
    ],
)
def test_columns_of_json_types_are_accepted(value: Any):
    check_rows(scorer_of(anything, isolation="process"), prompts("x", value), "training data")


@pytest.mark.parametrize(
    ("function", "column", "good", "bad", "reason"),
    [
        ("last_integer", "answer", ["1,234", 7, None, "#### 5", "1e3"], "twelve", "does not end with an integer: 'twelve'"),
        ("last_integer", "answer", [3.0], "12.5", "does not end with an integer"),
        ("last_integer", "answer", [], True, "does not end with an integer: 'True'"),
        ("last_number", "answer", ["12.5", 0.5, "3/4", None], "12,5", "can be read in only one way: '12,5'"),
        ("last_number", "answer", [], float("nan"), "has no number"),
        ("exact_match", "answer", ["x", 1, None], float("nan"), "the answer is NaN"),
        ("math_verify", "answer", [r"\frac{1}{2}", "9 500", 1e-05, None], r"\frac{", "cannot be read as mathematics"),
        (
            RewardFunction(function="json_schema", kwargs={}),
            "schema",
            [{"type": "object"}, '{"type": "array"}', None],
            '{"type": 3}',
            "the schema is not a valid JSON schema",
        ),
        (
            RewardFunction(function="unit_tests", kwargs={"unsafe_local": True}),
            "tests",
            ["assert 1", ["a"], None],
            [],
            "tests must be",
        ),
    ],
)
def test_answers_of_built_in_functions_are_checked_by_row(function: Any, column: str, good: list[Any], bad: Any, reason: str):
    scorer = scorer_of(function)
    check_rows(scorer, prompts(column, *good), "training data")
    with pytest.raises(
        ValueError, match=rf"row {10 + len(good)} of the training data: reward function '.*' cannot use it: .*{reason}"
    ):
        check_rows(scorer, prompts(column, *good, bad), "training data")


def test_a_users_function_can_check_rows():
    def check_level(level: int, **columns: Any) -> None:
        if level > 3:
            raise ValueError(f"level {level} does not exist")

    @with_check(check_level)
    def graded(completions, level, **kwargs):
        return [0.0] * len(completions)

    message = r"^row 11 of the evaluation data \(set 'hard'\): reward function 'graded' cannot use it: level 4 does not exist$"
    with pytest.raises(ValueError, match=message):
        check_rows(scorer_of(graded), prompts("level", 3, 4, eval_set="hard"), "evaluation data")


@pytest.mark.parametrize("error", [SystemExit(0), KeyError("x")])
def test_a_check_may_raise_anything(error: BaseException):
    def check(**columns: Any) -> None:
        raise error

    def scored(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=rf"row 10 .*'scored' cannot use it: {type(error).__name__}"):
        check_rows(scorer_of(with_check(check)(scored)), prompts("x", 1), "training data")


def test_slow_checks_leave_the_rest_for_later(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(row_checks, "CHECK_SECONDS", -1.0)
    with caplog.at_level("INFO", logger="rankup"):
        check_rows(scorer_of("last_integer"), prompts("answer", "none"), "training data")
    assert "have checked 0 of 1 rows" in caplog.text
