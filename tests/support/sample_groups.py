"""Weighted groups of made-up tokens, for tests that need no sampler."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tiny_models import SPECIAL_TOKENS, VOCABULARY

from rankup.grpo.packing import WeightedGroup
from rankup.rollout.types import Completion, PromptGroup


def make_group(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    advantages: Sequence[float] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    index: int = 0,
) -> WeightedGroup:
    """A group of these tokens; advantages 0 and log-probabilities -1 unless given."""
    drawn = [[-1.0] * len(ids) for ids in completions] if logprobs is None else logprobs
    group = PromptGroup(
        index=index,
        prompt_token_ids=tuple(prompt),
        completions=tuple(
            Completion(token_ids=tuple(ids), logprobs=tuple(lps), text="", finish_reason="stop", policy_version=0)
            for ids, lps in zip(completions, drawn, strict=True)
        ),
    )
    return WeightedGroup(group=group, advantages=tuple(advantages or [0.0] * len(completions)))


def random_groups(shapes: Sequence[tuple[int, Sequence[int]]], *, seed: int = 0) -> list[WeightedGroup]:
    """One group a shape (prompt length, completion lengths): random tokens, advantages and sampler's log-probabilities."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(len(SPECIAL_TOKENS), VOCABULARY) for _ in range(count)]

    return [
        make_group(
            tokens(prompt_length),
            [tokens(length) for length in lengths],
            advantages=[draw.gauss(0, 1) for _ in lengths],
            logprobs=[[draw.uniform(-6, -2) for _ in range(length)] for length in lengths],
            index=index,
        )
        for index, (prompt_length, lengths) in enumerate(shapes)
    ]
