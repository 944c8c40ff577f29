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
  of mean 1/2 more. For rewards of 0 and 1 this is the interval of Jeffreys. If all prompts have the same value, the lowest and
  the highest possible one stand in: after 128 successes in 128 prompts the interval is 0.98 to 1, never of width 0.
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
    array = np.asarray(values, dtype=np.float64)
    least, most = float(array.min()), float(array.max())
    ends = (min(lowest, least), max(highest, most)) if least == most else (least, most)
    return _interval(array, *ends)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The interval of the mean of `second - first` over the same prompts, by drawing prompts with both of their values.

    The lowest and the highest value of the Bayesian bootstrap are as far from 0: nothing says which of the two is better.

    Raises:
        ValueError: the two differ in length, or there is no value.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a paired difference needs as many values of both, and at least one (got {len(first)}, {len(second)})")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    largest = float(np.abs(differences).max()) or 1.0
    return _interval(differences, -largest, largest)


def _interval(values: Array, lowest: float, highest: float) -> Interval:
    """By the bootstrap that fits the values; `lowest` and `highest` are those of the Bayesian one."""
    distinct, counts = np.unique(values, return_counts=True)
    has_spread = len(distinct) > 2 and len(values) - counts.max() >= FEW
    low, high = _studentised(values) if has_spread else _bayesian(values, lowest, highest)
    mean = float(values.mean())
    return Interval(min(low, mean), max(high, mean))


def _studentised(values: Array) -> tuple[float, float]:
    n, mean = len(values), values.mean()
    error = values.std(ddof=1) / math.sqrt(n)
    random, ratios = np.random.default_rng(SEED), []
    for size in _parts(n):
        drawn = values[random.integers(n, size=(size, n))]
        errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append((drawn.mean(axis=1) - mean) / errors)
    low, high = _quantiles(np.nan_to_num(np.concatenate(ratios), nan=0.0, posinf=np.inf, neginf=-np.inf))
    return max(float(mean - high * error), float(values.min())), min(float(mean - low * error), float(values.max()))


def _bayesian(values: Array, lowest: float, highest: float) -> tuple[float, float]:
    n = len(values)
    random, means = np.random.default_rng(SEED), []
    for size in _parts(n):
        weights = random.standard_exponential((size, n))
        ends = random.standard_gamma(0.5, (size, 2))
        sums = weights @ values + ends @ np.array([lowest, highest])
        means.append(sums / (weights.sum(axis=1) + ends.sum(axis=1)))
    return _quantiles(np.concatenate(means))


def _parts(n: int) -> list[int]:
    """Numbers of resamples, each of n values, that are drawn at once."""
    size = max(1, min(RESAMPLES, CELLS // n))
    return [size] * (RESAMPLES // size) + ([RESAMPLES % size] if RESAMPLES % size else [])


def _quantiles(values: Array) -> tuple[float, float]:
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail], method="higher")
    return float(low), float(high)
