"""Sums and extremes are those of all tokens, however these are split."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.algorithm.tally import Tally

values = st.lists(st.floats(-100, 100), min_size=1, max_size=20)


def tally_of(x: list[float]) -> Tally:
    x_N = torch.tensor(x, dtype=torch.float64)
    return Tally.of(sums={"x": x_N, "squared": x_N.square()}, extremes={"x": x_N})


@given(st.lists(values, min_size=1, max_size=4))
def test_merged_parts_equal_the_total(parts: list[list[float]]):
    together = Tally.merge([Tally(), *(tally_of(part) for part in parts)])
    x = [value for part in parts for value in part]
    assert together.count == len(x)
    assert math.isclose(together.mean("x"), sum(x) / len(x), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(together.mean("squared"), sum(v * v for v in x) / len(x), rel_tol=1e-9, abs_tol=1e-9)
    assert (together.lowest["x"], together.highest["x"]) == (min(x), max(x))


def test_of_nothing_there_is_nothing():
    assert Tally.merge([Tally(), Tally()]) == Tally()
