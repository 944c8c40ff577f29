"""What an evaluation says about a model: pass@k, maj@k, and how far a mean over prompts can be trusted.

    pass_at_k(n=8, passed=2, k=4)                       # 0.786: of 4 of the 8 completions at least one passes
    majority_at_k(["4", "5", "4"], [True, False, True], k=3)        # 1.0: the most frequent answer passes
    mean_interval([1.0, 0.0, 0.5, ...])                 # Interval(low=0.41, high=0.62)
    difference_interval(before, after)                  # of mean(after - before), prompt by prompt

Intervals are made by resampling prompts, with the same random numbers each time. Prompts are drawn, not completions: the
completions of one prompt are alike, so 8 completions of 30 prompts say little more than 30 do. Two kinds of values need two
kinds of bootstrap:

- usually the studentised bootstrap (Efron and Tibshirani, 1993, section 12.5). Each resample gives `(its mean - mean) / (its
  standard error)`, and the quantiles of that take the place of Student's t. Unlike plain percentiles it is neither too narrow
  for few prompts nor off-centre for skewed rewards;
- the Bayesian bootstrap (Rubin, 1981) where almost all prompts have the same value, or only two values exist, so that
  resamples often have no spread at all. Each prompt gets a random weight of mean 1, and the lowest and the highest value one
  of mean 3/4 more. (With 1/2 it would be the interval of Jeffreys for rewards of 0 and 1, which contains rates near 0 and 1 too
  rarely.) If all prompts have the same value, the lowest and the highest possible one stand in: after 128 successes in 128
  prompts the interval is 0.98 to 1, never of width 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 4000
SEED = 20110
FEW = 6
"""With fewer values that differ from the most frequent one, over a quarter of a percent of all resamples have no spread."""

WEIGHT_OF_ENDS = 0.75
"""Of the lowest and the highest value in the Bayesian bootstrap, in prompts."""

CELLS = 2**20
"""Values that are drawn at once, which bounds the memory."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of 95 %."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts, and its interval of 95 %. All are NaN if no prompt has a value."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The probability that of k of n completions, drawn without replacement, at least one passes: the unbiased estimate of
    `1 - (1 - p)**k` (Chen et al. 2021, arXiv 2107.03374), as a product, since binomial coefficients overflow.

    Raises:
        ValueError: not `1 <= k <= n` and `0 <= passed <= n`.
    """
    if not (1 <= k <= n and 0 <= passed <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= passed <= n (got k {k}, n {n}, passed {passed})")
    if n - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - passed + 1, n + 1))


def majority_at_k(answers: Sequence[Hashable | None], passes: Sequence[bool], k: int) -> float:
    """The expected score of the most frequent answer among k of n completions, drawn without replacement (maj@k; Wang et al.
    2022, arXiv 2203.11171).

    Answers that are equally frequent share: each counts with the same weight. None is no answer, and has no vote; without any
    answer the score is 0. An answer scores the share of its completions that pass.

    Raises:
        ValueError: the two sequences differ in length, or not `1 <= k <= n`.
    """
    n = len(answers)
    if len(passes) != n or not 1 <= k <= n:
        raise ValueError(f"maj@k needs 1 <= k <= n and a result for each answer (got k {k}, n {n}, results {len(passes)})")
    counts = Counter(answer for answer in answers if answer is not None)
    abstentions = n - sum(counts.values())
    score = 0.0
    for answer, count in counts.items():
        correct = sum(passed for one, passed in zip(answers, passes, strict=True) if one == answer)
        if correct:
            others = [other for one, other in counts.items() if one != answer]
            score += correct / count * _expected_win(count, others, abstentions, k)
    return score


def _expected_win(count: int, others: Sequence[int], abstentions: int, k: int) -> float:
    """The expected share of the vote's win of an answer that `count` of all completions give, if k of them are drawn.

    Exact, in integers: for each number of its votes, the draws of the others are counted by how many votes they take and how
    many of them tie.
    """
    wins = 0.0
    total = math.comb(count + sum(others) + abstentions, k)
    for votes in range(1, min(count, k) + 1):
        left = k - votes
        ways = {(drawn, 0): math.comb(abstentions, drawn) for drawn in range(min(abstentions, left) + 1)}
        for other in others:
            longer: Counter[tuple[int, int]] = Counter()
            for (used, ties), number in ways.items():
                for drawn in range(min(other, votes, left - used) + 1):
                    longer[used + drawn, ties + (drawn == votes)] += number * math.comb(other, drawn)
            ways = longer
        for (used, ties), number in ways.items():
            if used == left:
                wins += math.comb(count, votes) * number / total / (1 + ties)
    return wins


def mean_interval(values: Sequence[float], *, lowest: float = 0.0, highest: float = 1.0) -> Interval:
    """The interval of the mean of one value for each prompt, see the module's docstring; it contains the mean.

    lowest, highest: possible values of a prompt, where all prompts have the same one. Values beyond them are possible too.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("no values: an interval needs at least one")
    ((low, high),) = mean_intervals(np.asarray([values], dtype=np.float64), lowest=lowest, highest=highest)
    return Interval(float(low), float(high))


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The interval of the mean of `second - first` over the same prompts, by drawing prompts with both of their values.

    Raises:
        ValueError: the two differ in length, or there is no value.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a paired difference needs as many values of both, at least one (got {len(first)} and {len(second)})")
    ((low, high),) = difference_intervals(np.asarray([first], dtype=np.float64), np.asarray([second], dtype=np.float64))
    return Interval(float(low), float(high))


def mean_intervals(values_MN: Array, *, lowest: float = 0.0, highest: float = 1.0) -> Array:
    """`mean_interval` of M evaluations of N prompts at once: [M, 2]."""
    least, most = values_MN.min(axis=1), values_MN.max(axis=1)
    is_constant = least == most
    low_M = np.where(is_constant, np.minimum(lowest, least), least)
    return _intervals(values_MN, low_M, np.where(is_constant, np.maximum(highest, most), most))


def difference_intervals(first_MN: Array, second_MN: Array) -> Array:
    """`difference_interval` of M pairs of evaluations of N prompts at once: [M, 2].

    The lowest and the highest value of the Bayesian bootstrap are as far from 0: nothing says which of the two is better.
    """
    differences_MN = second_MN - first_MN
    largest_M = np.abs(differences_MN).max(axis=1)
    largest_M = np.where(largest_M == 0.0, 1.0, largest_M)
    return _intervals(differences_MN, -largest_M, largest_M)


def _intervals(values_MN: Array, lowest_M: Array, highest_M: Array) -> Array:
    """By the bootstrap that fits each row; `lowest_M` and `highest_M` are values of the Bayesian one."""
    found = [np.unique(row, return_counts=True)[1] for row in values_MN]
    has_spread = np.array([len(counts) > 2 and counts.sum() - counts.max() >= FEW for counts in found])
    intervals = np.empty((len(values_MN), 2))
    if has_spread.any():
        intervals[has_spread] = _studentised(values_MN[has_spread])
    if not has_spread.all():
        rest = ~has_spread
        intervals[rest] = _bayesian(values_MN[rest], lowest_M[rest], highest_M[rest])
    means = values_MN.mean(axis=1)
    return np.stack([np.minimum(intervals[:, 0], means), np.maximum(intervals[:, 1], means)], axis=1)


def _studentised(values_MN: Array) -> Array:
    n, mean_M = values_MN.shape[1], values_MN.mean(axis=1)
    centred_MN = values_MN - mean_M[:, None]
    error_M = values_MN.std(axis=1, ddof=1) / math.sqrt(n)
    random, ratios = np.random.default_rng(SEED), []
    for size in _parts(n):
        drawn = random.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts_NR = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).T.astype(np.float64)
        mean_MR = centred_MN @ counts_NR / n
        variance_MR = np.maximum(centred_MN**2 @ counts_NR / n - mean_MR**2, 0.0) * n / (n - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(mean_MR / np.sqrt(variance_MR / n))
    quantiles_M2 = _quantiles(np.nan_to_num(np.concatenate(ratios, axis=1), nan=0.0, posinf=np.inf, neginf=-np.inf))
    low_M = mean_M - quantiles_M2[:, 1] * error_M
    high_M = mean_M - quantiles_M2[:, 0] * error_M
    return np.stack([np.maximum(low_M, values_MN.min(axis=1)), np.minimum(high_M, values_MN.max(axis=1))], axis=1)


def _bayesian(values_MN: Array, lowest_M: Array, highest_M: Array) -> Array:
    n = values_MN.shape[1]
    random, means = np.random.default_rng(SEED), []
    for size in _parts(n):
        weights_NR = random.standard_exponential((size, n)).T
        low_R, high_R = random.standard_gamma(WEIGHT_OF_ENDS, (2, size))
        sums_MR = values_MN @ weights_NR + lowest_M[:, None] * low_R + highest_M[:, None] * high_R
        means.append(sums_MR / (weights_NR.sum(axis=0) + low_R + high_R))
    return _quantiles(np.concatenate(means, axis=1))


def _parts(n: int) -> list[int]:
    """Numbers of resamples, each of n values, that are drawn at once."""
    size = max(1, min(RESAMPLES, CELLS // n))
    return [size] * (RESAMPLES // size) + ([RESAMPLES % size] if RESAMPLES % size else [])


def _quantiles(values_MR: Array) -> Array:
    """Both ends of the middle 95 %: [M, 2]."""
    tail = (1.0 - LEVEL) / 2
    return np.quantile(values_MR, [tail, 1.0 - tail], axis=1, method="higher").T
