r"""The answers that built-in rewards log, one text for all ways to write an answer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored import inputs, scorer_of

from rankup.rewards.answers import exact_match_of
from rankup.rewards.written_numbers import number_of, number_text


def logged(function: Any, texts: list[str], answer: Any) -> list[Any]:
    scores = scorer_of(function).score(inputs(*texts, answer=[answer] * len(texts)))
    return scores.extras["extracted_answer"]


@pytest.mark.parametrize("name", ["last_integer", "last_number"])
def test_the_last_number(name: str):
    assert logged(name, ["It is 4.0", "so 1,234.", "none", "3/4"], 4) == ["4", "1234", None, "0.75"]


def test_the_whole_text():
    assert logged("exact_match", [" yes ", "No"], "yes") == ["yes", "No"]
    assert logged(exact_match_of(ignore_case=True), [" Yes ", "No"], "yes") == ["yes", "no"]


def test_mathematics():
    texts = [r"\boxed{0.5}", r"It is $\frac{1}{2}$", r"\boxed{2}", r"\boxed{x + 1}", "no idea"]
    assert logged("math_verify", texts, r"\frac{1}{2}") == ["0.5", "0.5", "2", "x + 1", None]
    assert logged("math_verify", [r"$1 + x$", r"$x + 2$"], "x + 1") == ["x + 1", "x + 2"]


def test_a_function_that_is_called_directly_logs_nothing():
    from rankup.rewards.answers import last_number

    assert last_number(completions=["4"], answer=[4]) == [1.0]


@given(st.fractions() | st.integers(-(10**40), 10**40).map(Fraction))
def test_the_text_of_a_number_is_read_back(number: Fraction):
    assert number_of(number_text(number)) == number


def test_a_number_beyond_all_decimals_has_a_text_too():
    assert number_text(Fraction(10**10_000)).startswith("0x")
