"""The data of the quick start: sums of two numbers from 1 to 50.

    data:
      train: rankup.configs.quickstart:train
      eval: rankup.configs.quickstart:evaluation
    rewards:
      functions: rankup.rewards.answers:last_integer

128 sums are kept for evaluation. No evaluation sum occurs in training, in either order of its terms; every other
ordered pair is a training row. The choice does not depend on the seed of a run, so all runs are evaluated on the same sums.
"""

import random
from itertools import combinations_with_replacement

LARGEST_TERM = 50
NUM_EVALUATION_SUMS = 128
_SPLIT_SEED = 2025


def train() -> list[dict]:
    """Every ordered pair of terms that evaluation uses in neither order; rows {"prompt", "answer"}."""
    held_out = {frozenset(pair) for pair in _evaluation_pairs()}
    terms = range(1, LARGEST_TERM + 1)
    return [_row(a, b) for a in terms for b in terms if frozenset((a, b)) not in held_out]


def evaluation() -> list[dict]:
    """The 128 sums held out for evaluation; rows {"prompt", "answer"}."""
    return [_row(a, b) for a, b in _evaluation_pairs()]


def _evaluation_pairs() -> list[tuple[int, int]]:
    choice = random.Random(_SPLIT_SEED)
    unordered = list(combinations_with_replacement(range(1, LARGEST_TERM + 1), 2))
    chosen = choice.sample(unordered, NUM_EVALUATION_SUMS)
    return [(a, b) if choice.random() < 0.5 else (b, a) for a, b in chosen]


def _row(a: int, b: int) -> dict:
    return {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
