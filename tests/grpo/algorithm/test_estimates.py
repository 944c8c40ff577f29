"""pass@k and maj@k against all subsets, and intervals that contain the truth as often as they say."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.algorithm.estimates import (
    difference_interval,
    difference_intervals,
    majority_at_k,
    mean_interval,
    mean_intervals,
    pass_at_k,
)

EVALUATIONS = 1000

Draw = Callable[[np.random.Generator], tuple[np.ndarray, float]]


@st.composite
def completions(draw: st.DrawFn) -> tuple[list[str | None], list[bool], int]:
    """Answers of up to 8 completions with their results, and a k."""
    answers = draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8))
    passes = draw(st.lists(st.booleans(), min_size=len(answers), max_size=len(answers)))
    return answers, passes, draw(st.integers(1, len(answers)))


def score_of_majority(answers: Sequence[str | None], passes: Sequence[bool]) -> float:
    """The score of one vote, by its definition."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    shares = [statistics.fmean(p for a, p in zip(answers, passes, strict=True) if a == answer) for answer in winners]
    return statistics.fmean(shares) if shares else 0.0


@given(completions())
def test_pass_at_k_is_the_mean_over_all_subsets(made: tuple[list[str | None], list[bool], int]):
    _, passes, k = made
    subsets = [any(subset) for subset in itertools.combinations(passes, k)]
    assert pass_at_k(len(passes), sum(passes), k) == pytest.approx(statistics.fmean(subsets), abs=1e-12)


@settings(deadline=None)
@given(completions())
def test_majority_at_k_is_the_mean_over_all_subsets(made: tuple[list[str | None], list[bool], int]):
    answers, passes, k = made
    by_answer: dict[str | None, list[bool]] = {}
    for answer, passed in zip(answers, passes, strict=True):
        by_answer.setdefault(answer, []).append(passed)
    subsets = [
        score_of_majority([answers[n] for n in chosen], [passes[n] for n in chosen])
        for chosen in itertools.combinations(range(len(answers)), k)
    ]
    assert majority_at_k(answers, passes, k) == pytest.approx(statistics.fmean(subsets), abs=1e-12)


def test_answers_that_tie_share_and_no_answer_abstains():
    assert majority_at_k(["1", "2"], [True, False], 2) == 0.5
    assert majority_at_k([None, None, "2"], [False, False, True], 3) == 1.0
    assert majority_at_k([None, None], [True, True], 2) == 0.0


def test_pass_at_k_of_many_completions_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 9_999, 2) == 1.0 and pass_at_k(10_000, 0, 10_000) == 0.0


@pytest.mark.parametrize(("n", "passed", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_impossible_counts_are_refused(n: int, passed: int, k: int):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, passed, k)
    with pytest.raises(ValueError, match=r"maj@k|pass@k"):
        majority_at_k(["a"] * n, [True] * n, 9)


# ----------------------------------------------------------------------------------------------------------- intervals


def sampled(prompts: int, samples: int, a: float, b: float) -> Draw:
    """Mean rewards of prompts whose completions pass with a probability from Beta(a, b)."""

    def draw(random: np.random.Generator) -> tuple[np.ndarray, float]:
        rates = random.beta(a, b, size=(EVALUATIONS, prompts))
        return random.binomial(samples, rates) / samples, a / (a + b)

    return draw


def exponential(random: np.random.Generator) -> tuple[np.ndarray, float]:
    """Rewards without an upper bound."""
    return random.exponential(size=(EVALUATIONS, 60)), 1.0


SHAPES: dict[str, Draw] = {
    "128 prompts, 8 samples": sampled(128, 8, 1, 1),
    "128 prompts, 8 samples, easy or hard": sampled(128, 8, 0.3, 0.3),
    "128 prompts, 8 samples, mostly hard": sampled(128, 8, 0.2, 2),
    "128 prompts, greedy": sampled(128, 1, 1, 1),
    "128 prompts, greedy, mostly hard": sampled(128, 1, 1, 9),
    "30 prompts, 8 samples": sampled(30, 8, 1, 1),
    "30 prompts, 8 samples, skewed": sampled(30, 8, 0.3, 1.5),
    "30 prompts, greedy": sampled(30, 1, 1, 1),
    "60 prompts, exponential": exponential,
}


@pytest.mark.slow
@pytest.mark.parametrize("draw", SHAPES.values(), ids=SHAPES)
def test_an_interval_contains_the_truth_in_95_of_100_evaluations(draw: Draw):
    values, truth = draw(np.random.default_rng(1))
    intervals = mean_intervals(values)
    covered = np.mean((intervals[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= intervals[:, 1]))
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("prompts", "least"), [(30, 0.91), (128, 0.93)])
def test_an_interval_of_greedy_answers_contains_every_rate_nearly_as_often(prompts: int, least: float):
    """Exactly: a rate of success has only so many outcomes, so that no interval contains each rate in just 95 of 100 cases."""
    outcomes = np.array([[1.0] * passed + [0.0] * (prompts - passed) for passed in range(prompts + 1)])
    intervals, rates = mean_intervals(outcomes), np.linspace(0.02, 0.98, 97)
    ways = np.array([math.comb(prompts, passed) for passed in range(prompts + 1)], dtype=float)
    passed = np.arange(prompts + 1)
    chances = ways * rates[:, None] ** passed * (1 - rates[:, None]) ** (prompts - passed)
    contains = (intervals[:, 0] <= rates[:, None]) & (rates[:, None] <= intervals[:, 1])
    covered = (chances * contains).sum(axis=1)
    assert covered.min() > least and 0.94 < covered.mean() < 0.96


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_so_does_an_interval_of_a_difference(samples: int, gain: float):
    random = np.random.default_rng(2)
    rates = random.beta(0.5, 0.5, size=(EVALUATIONS, 128))
    improves = random.random(rates.shape) < 0.25
    better = np.where(improves, rates + gain * (1 - rates), rates)
    first, second = (random.binomial(samples, one) / samples for one in (rates, better))
    truth = 0.25 * gain * 0.5
    intervals = difference_intervals(first, second)
    covered = np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
    assert 0.93 <= covered <= 0.975


@pytest.mark.slow
def test_a_paired_interval_is_narrower_than_that_of_either_mean():
    random = np.random.default_rng(3)
    first = random.binomial(8, random.beta(0.5, 0.5, size=128)) / 8
    second = np.clip(first + random.normal(0.05, 0.05, size=128), 0, 1)
    paired, alone = difference_interval(list(first), list(second)), mean_interval(list(first))
    assert 0.03 < paired.low < paired.high < 0.07
    assert alone.high - alone.low > 5 * (paired.high - paired.low)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=40), st.integers(0, 2))
def test_an_interval_contains_the_mean_is_not_empty_and_is_always_the_same(values: list[float], digits: int):
    values = [round(value, digits) for value in values]
    interval = mean_interval(values)
    assert interval.low - 1e-12 <= np.mean(values) <= interval.high + 1e-12 and interval.low < interval.high
    assert mean_interval(values) == interval
    assert math.isfinite(interval.low) and math.isfinite(interval.high)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rewards_at_a_bound_leave_room_towards_the_other_bound(value: float):
    interval = mean_interval([value] * 128)
    assert 0.01 < interval.high - interval.low < 0.03
    assert value in (interval.low, interval.high) and 0 <= interval.low <= interval.high <= 1
    assert mean_interval([value] * 10).high - mean_interval([value] * 10).low > 0.1


def test_equal_rewards_of_two_evaluations_leave_room_on_both_sides():
    interval = difference_interval([0.5] * 128, [0.5] * 128)
    assert -0.03 < interval.low < 0 < interval.high < 0.03


def test_a_few_wins_are_no_proof_and_many_are():
    nothing = [0.0] * 128
    assert difference_interval(nothing, [1.0] * 2 + [0.0] * 126).low <= 0
    assert difference_interval(nothing, [1.0] * 12 + [0.0] * 116).low > 0


def test_several_intervals_at_once_are_those_of_each():
    values = np.random.default_rng(4).choice([0.0, 0.5, 1.0], size=(3, 20))
    values[1] = 1.0
    intervals = [mean_interval(list(row)) for row in values]
    np.testing.assert_allclose(mean_intervals(values), [[one.low, one.high] for one in intervals], rtol=1e-6)


def test_no_value_has_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="as many values of both"):
        difference_interval([1.0], [1.0, 2.0])
