"""Built-in rewards for the length of a completion, in tokens.

    rewards:
      functions:
        - {function: "rankup.rewards.lengths:target_length", kwargs: {tokens: 100, tolerance: 10}}
        - {function: "rankup.rewards.lengths:soft_overlong", kwargs: {max_completion_length: 1024}}

Lengths are those of `completion_ids`, the sampled tokens including an end token. Of an episode, tokens that were given to it,
such as results of tools, do not count.
"""

from collections.abc import Sequence
from typing import Any

from .texts import Function


def target_length(tokens: int, *, tolerance: int = 0, falloff: int | None = None) -> Function:
    """Make a reward: 1.0 near the target length, falling linearly to 0.0.

    tokens: the target length. tolerance: how many tokens more or fewer still get 1.0. falloff: over how many further tokens
    the reward falls to 0.0; by default `tokens - tolerance`, so that an empty completion gets 0.0.

    Raises ValueError for values out of range.
    """
    falloff = tokens - tolerance if falloff is None else falloff
    if tokens < 1 or tolerance < 0 or falloff < 1:
        raise ValueError(
            f"target_length(tokens={tokens}, tolerance={tolerance}, falloff={falloff}): tokens and falloff must be at "
            "least 1, tolerance at least 0, and less than tokens if falloff is not set"
        )

    def reward(
        completion_ids: Sequence[Sequence[int]], sampled_lengths: Sequence[int] | None = None, **kwargs: Any
    ) -> list[float | None]:
        lengths = map(len, completion_ids) if sampled_lengths is None else sampled_lengths
        excess = [max(0, abs(length - tokens) - tolerance) for length in lengths]
        return [max(0.0, 1.0 - tokens_off / falloff) for tokens_off in excess]

    reward.__name__ = "target_length"
    return reward


def soft_overlong(max_completion_length: int, *, cache_tokens: int | None = None) -> Function:
    """Make DAPO's penalty for completions close to the limit (arXiv 2503.14476, equation 13).

    0.0 up to `max_completion_length - cache_tokens` tokens, then falling linearly to -1.0 at `max_completion_length`,
    and -1.0 beyond it.

    max_completion_length: the limit in tokens, usually the run's. cache_tokens: the width of the slope; by default a
    fifth of the limit, as in the paper (4,096 of 20,480).

    Raises ValueError if `cache_tokens` is not between 1 and `max_completion_length`.
    """
    cache = max(1, max_completion_length // 5) if cache_tokens is None else cache_tokens
    if not 1 <= cache <= max_completion_length:
        raise ValueError(f"soft_overlong: cache_tokens ({cache}) must be between 1 and {max_completion_length}, the limit")

    def reward(
        completion_ids: Sequence[Sequence[int]], sampled_lengths: Sequence[int] | None = None, **kwargs: Any
    ) -> list[float | None]:
        lengths = map(len, completion_ids) if sampled_lengths is None else sampled_lengths
        excess = [max(0, length - (max_completion_length - cache)) for length in lengths]
        return [-min(1.0, tokens_over / cache) if tokens_over else 0.0 for tokens_over in excess]

    reward.__name__ = "soft_overlong"
    return reward
