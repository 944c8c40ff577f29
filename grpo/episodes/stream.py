"""The tokens of an episode while it is played: sampled ones come from the engine and stay as they are, given ones are added.

    stream = Stream(prompt_token_ids)
    stream.sampled(turn)
    stream.give(bridge)
    stream.token_ids, stream.logprobs, stream.given         # as in `Completion`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...rollout.turns import Turn
from ...rollout.types import Span


@dataclass(slots=True)
class Stream:
    """See the module's docstring.

    `recomputed`: tokens that the engine computed again for a later turn, because it no longer had their keys and values.
    `routed_experts`: as in `Completion`; of such tokens those of the turn that was sampled first.
    """

    prompt: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    given: list[Span] = field(default_factory=list)
    recomputed: int = 0
    routed_experts: np.ndarray | None = None
    _computed: int = 0

    @property
    def all(self) -> tuple[int, ...]:
        """The prompt of the next turn: everything so far."""
        return (*self.prompt, *self.token_ids)

    def sampled(self, turn: Turn) -> None:
        """Add a turn of the model."""
        self.recomputed += max(0, self._computed - turn.cached_tokens)
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        if turn.routed_experts is None:
            self.routed_experts = None
        else:
            known = turn.routed_experts[:0] if self.routed_experts is None else self.routed_experts
            self.routed_experts = np.concatenate([known, turn.routed_experts[len(known) :]])
        self._computed = len(self.prompt) + len(self.token_ids) - 1  # the newest token has not been through the model

    def give(self, token_ids: Sequence[int]) -> None:
        """Add tokens that were not sampled, behind a turn."""
        if token_ids:
            start = len(self.token_ids)
            self.given.append((start, start + len(token_ids)))
            self.token_ids += token_ids
