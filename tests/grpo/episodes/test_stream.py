"""The tokens of an episode while it is played: what of a turn is kept."""

from __future__ import annotations

import numpy as np

from rankup.grpo.episodes.stream import Stream
from rankup.rollout.turns import Turn


def turn(*token_ids: int, experts: np.ndarray | None) -> Turn:
    return Turn(
        token_ids=token_ids,
        logprobs=(-1.0,) * len(token_ids),
        text="",
        finish_reason="stop",
        ended_by_token=True,
        policy_version=0,
        cached_tokens=0,
        routed_experts=experts,
    )


def experts_of(turn_number: int, tokens: int) -> np.ndarray:
    """One layer, one expert: that number."""
    return np.full((tokens, 1, 1), turn_number, dtype=np.uint8)


def test_the_experts_of_a_token_are_those_that_were_chosen_first() -> None:
    """A later turn computes earlier tokens again, which were sampled with the earlier choice."""
    stream = Stream((1, 2, 3))
    stream.sampled(turn(4, 5, experts=experts_of(1, 4)))
    stream.give((6,))
    stream.sampled(turn(7, 8, experts=experts_of(2, 7)))
    assert stream.routed_experts is not None
    assert stream.routed_experts.flatten().tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert len(stream.routed_experts) == len(stream.all) - 1


def test_a_turn_without_experts_leaves_those_of_its_tokens_unknown() -> None:
    stream = Stream((1, 2))
    stream.sampled(turn(3, experts=experts_of(1, 2)))
    stream.sampled(turn(4, experts=None))
    assert stream.routed_experts is None
    stream.sampled(turn(5, experts=experts_of(3, 4)))
    assert stream.routed_experts is not None and len(stream.routed_experts) == 4
