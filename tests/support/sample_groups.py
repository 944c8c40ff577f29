"""Groups of made-up tokens, for tests that need no sampler, and an objective's loss on made-up log-probabilities.

    (one,) = pack(random_groups([(4, [3, 5])]), tokens_per_pack=1000)
    loss = loss_on_leaves(objective.of(one, constants, ...), logprobs_N, entropies_N)
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tiny_models import SPECIAL_TOKENS, VOCABULARY

from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt
from rankup.rollout.types import Completion, Episode

if TYPE_CHECKING:
    import torch

    from rankup.grpo.update.objective import PackLoss

CHUNK = 4  # tokens: smaller than most completions


def make_group(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    advantages: Sequence[float] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    truncated: Sequence[int] = (),
) -> Group:
    """A group of these tokens; by default advantages 0 and log-probabilities -1. `truncated`: which ones were cut off."""
    drawn = [[-1.0] * len(ids) for ids in completions] if logprobs is None else logprobs
    reasons: list[Literal["stop", "length"]] = ["length" if i in truncated else "stop" for i in range(len(completions))]
    return Group(
        prompt=Prompt(content="", token_ids=tuple(prompt)),
        completions=tuple(
            Completion(token_ids=tuple(ids), logprobs=tuple(lps), text="", finish_reason=reason, policy_version=0)
            for ids, lps, reason in zip(completions, drawn, reasons, strict=True)
        ),
        advantages=tuple(advantages or [0.0] * len(completions)),
    )


def random_groups(
    shapes: Sequence[tuple[int, Sequence[int]]], *, seed: int = 0, truncated: Sequence[int] = ()
) -> list[Group]:
    """One group a shape (prompt length, completion lengths): random tokens, advantages and sampler's log-probabilities.

    `truncated`: which completions of each group were cut off.
    """
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(len(SPECIAL_TOKENS), VOCABULARY) for _ in range(count)]

    return [
        make_group(
            tokens(prompt_length),
            [tokens(length) for length in lengths],
            advantages=[draw.gauss(0, 1) for _ in lengths],
            logprobs=[[draw.uniform(-6, -2) for _ in range(length)] for length in lengths],
            truncated=truncated,
        )
        for prompt_length, lengths in shapes
    ]


def with_given(
    groups: Sequence[Group], *, seed: int = 0, shares: Sequence[float] = (0.0, 0.3, 0.5, 1.0)
) -> list[Group]:
    """The groups with random ranges of each completion given, which have no log-probabilities. `shares`: of its tokens."""
    draw = random.Random(seed)

    def of_episode(completion: Completion) -> Completion:
        share = draw.choice(shares)
        is_given = [draw.random() < share for _ in completion.token_ids]
        edges = [i for i, (a, b) in enumerate(itertools.pairwise([False, *is_given, False])) if a != b]
        logprobs = [logprob for logprob, given in zip(completion.logprobs, is_given, strict=True) if not given]
        return dataclasses.replace(
            completion, given=tuple(zip(edges[::2], edges[1::2], strict=True)), logprobs=tuple(logprobs)
        )

    return [dataclasses.replace(group, completions=tuple(map(of_episode, group.completions))) for group in groups]


def void(completion: Completion, reason: str = "RuntimeError: the server is gone") -> Completion:
    """The completion, if it were an episode whose environment failed."""
    return dataclasses.replace(completion, episode=Episode(messages=(), turns=1, failure=reason), finish_reason="failed")


def with_logprobs(groups: Sequence[Group], logprobs: Sequence[torch.Tensor]) -> list[Group]:
    """The groups with other sampler's log-probabilities: one tensor a completion with sampled tokens, in order."""
    remaining = iter(logprobs)

    def with_others(completion: Completion) -> Completion:
        others = tuple(next(remaining).tolist()) if completion.logprobs else ()
        assert len(others) == len(completion.logprobs)
        return dataclasses.replace(completion, logprobs=others)

    return [
        dataclasses.replace(group, completions=tuple(map(with_others, group.completions))) for group in groups
    ]


def loss_on_leaves(loss: PackLoss, logprobs_N: torch.Tensor, entropies_N: torch.Tensor) -> torch.Tensor:
    """The loss (scalar, differentiable) as `linear_logprob_loss` forms it: in chunks or in one piece, and the factor last."""
    import torch

    tokens = len(logprobs_N)
    step = CHUNK if loss.passes == 1 else tokens
    chunks = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    loss_N = torch.cat([loss.token_loss(logprobs_N[chunk], entropies_N[chunk], chunk) for chunk in chunks])
    if loss.factor is not None:
        loss_N = loss_N * loss.factor(logprobs_N.detach(), entropies_N.detach())
    return loss_N.sum()
