"""A built-in penalty for completions that repeat themselves.

    rewards:
      functions:
        - rankup.rewards.answers:last_integer
        - {function: "rankup.rewards.repetition:repetition_penalty", kwargs: {ngram: 4, max_penalty: -0.5}}
"""

import math
from collections.abc import Sequence
from typing import Any

from .texts import Completion, Function, text_of


def repetition_penalty(ngram: int = 3, *, max_penalty: float = -1.0) -> Function:
    """Make a reward: `max_penalty` times the share of the completion's n-grams that are repetitions.

    The share is 1 - (distinct n-grams) / (n-grams), as in arXiv 2502.03373, here over the complete text: the reward is 0.0 if
    no n-gram repeats, and close to `max_penalty` for an endless loop. A completion of fewer than `ngram` words gets 0.0.

    ngram: words per n-gram. Words are separated by white space and compared in lower case, so this finds almost nothing in a
    language that is written without spaces. max_penalty: at most 0.

    Raises ValueError for an `ngram` below 1 or a `max_penalty` above 0.
    """
    if ngram < 1:
        raise ValueError(f"repetition_penalty: ngram must be at least 1, not {ngram}")
    if not -math.inf < max_penalty <= 0:
        raise ValueError(f"repetition_penalty: max_penalty must be a finite number of at most 0, not {max_penalty}")

    def reward(completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        return [_repeated_share(text_of(completion).lower().split(), ngram) * max_penalty for completion in completions]

    reward.__name__ = "repetition_penalty"
    return reward


def _repeated_share(words: Sequence[str], ngram: int) -> float:
    ngrams = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
