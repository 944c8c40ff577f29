"""Which tokens of a pack of shared prompts a convolution and a recurrence see.

    plan = plan_recurrence([(7, [5, 3]), (2, [4])])     # prompt length, completion lengths of each group
    rows = plan.prompts.rows(tokens_LW)                 # [2, 7, W], padded behind the second prompt
    plan.windows(4)                                     # of a convolution of four taps

All prompts are sequences of one batch, all completions of another one, which begins with the states that the prompts end with.

Shapes: L tokens of the pack, U sequences of a batch, T tokens of its longest, W anything, B tokens whose window is not the
tokens before them in the pack, K taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .repeated_rows import RowCopies


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of a pack as rows of one length.

    Attributes:
        tokens_UT: the pack's token at each place; behind a sequence's end its last one again.
        is_padding_UT: which places are behind the end.
    """

    tokens_UT: torch.Tensor
    is_padding_UT: torch.Tensor

    def rows(self, tokens_LW: torch.Tensor) -> torch.Tensor:
        """[L, ...] to [U, T, ...]."""
        return tokens_LW.index_select(0, self.tokens_UT.flatten()).unflatten(0, self.tokens_UT.shape)

    def padded(self, tokens_LW: torch.Tensor, fill: float) -> torch.Tensor:
        """`rows`, with a value in place of all padding, which has no gradient then."""
        rows = self.rows(tokens_LW)
        return rows.masked_fill(self.is_padding_UT.view(*self.is_padding_UT.shape, *[1] * (rows.dim() - 2)), fill)


@dataclass(frozen=True, slots=True)
class Windows:
    """The tokens of a pack that a convolution over the whole pack gets wrong, and what they see.

    Attributes:
        tokens_B: these tokens: the first K - 1 of each prompt and of each completion.
        seen: for each of them and each tap, the last one being the token itself, the pack's token. [B * K] places.
        is_before_BK: taps before the beginning of the prompt, where a convolution sees zeros.
    """

    tokens_B: torch.Tensor
    seen: RowCopies
    is_before_BK: torch.Tensor


@dataclass(frozen=True, eq=False)
class RecurrencePlan:
    """See the module's docstring.

    Attributes:
        prompts, completions: the two batches; None: the pack has no completions.
        prompt_of: the prompt before each completion.
        places_L: where each of the pack's tokens stands among those of both batches, flattened and in this order.
    """

    prompts: Batch
    completions: Batch | None
    prompt_of: RowCopies
    places_L: torch.Tensor
    sequences: tuple[tuple[int, int, int, int], ...]
    device: torch.device | str
    _windows: dict[int, Windows] = field(default_factory=dict, repr=False)

    def windows(self, taps: int) -> Windows:
        if taps not in self._windows:
            self._windows[taps] = self._plan_windows(taps)
        return self._windows[taps]

    def _plan_windows(self, taps: int) -> Windows:
        tokens: list[int] = []
        seen: list[int] = []
        before: list[list[bool]] = []
        for start, length, prompt_end, prompt_length in self.sequences:
            for token in range(min(taps - 1, length)):
                tokens.append(start + token)
                # Position in the sequence counted from its own first token; its prompt's tokens have negative ones.
                positions = range(token - taps + 1, token + 1)
                places = [start + p if p >= 0 else prompt_end + p if -p <= prompt_length else None for p in positions]
                seen += [start if place is None else place for place in places]
                before.append([place is None for place in places])
        length = len(self.places_L)
        return Windows(
            tokens_B=torch.tensor(tokens, dtype=torch.long, device=self.device),
            seen=RowCopies(seen, length, self.device),
            is_before_BK=torch.tensor(before, dtype=torch.bool, device=self.device).view(-1, taps),
        )


def plan_recurrence(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> RecurrencePlan:
    """The plan for (prompt length, completion lengths) of each group, in the pack's order. Completions may be empty."""
    prompts: list[tuple[int, int]] = []
    completions: list[tuple[int, int]] = []
    prompt_of: list[int] = []
    sequences: list[tuple[int, int, int, int]] = []  # first token, length; end of the prompt before it, and its length
    end = 0
    for prompt_length, completion_lengths in groups:
        prompts.append((end, prompt_length))
        sequences.append((end, prompt_length, end, 0))
        end += prompt_length
        prompt_end = end
        for length in completion_lengths:
            if length > 0:
                completions.append((end, length))
                prompt_of.append(len(prompts) - 1)
                sequences.append((end, length, prompt_end, prompt_length))
            end += length
    places_L = torch.empty(end, dtype=torch.long)
    first = _batch(prompts, places_L, 0, device)
    second = _batch(completions, places_L, first.tokens_UT.numel(), device) if completions else None
    return RecurrencePlan(
        first, second, RowCopies(prompt_of, len(prompts), device), places_L.to(device), tuple(sequences), device
    )


def _batch(sequences: list[tuple[int, int]], places_L: torch.Tensor, offset: int, device: torch.device | str) -> Batch:
    """The batch of (first token, length); writes the places of their tokens, counted from `offset`."""
    start_U, length_U = torch.tensor(sequences).unbind(1)
    place_T = torch.arange(int(length_U.max()))
    is_token_UT = place_T < length_U[:, None]
    tokens_UT = start_U[:, None] + torch.minimum(place_T, length_U[:, None] - 1)
    places_L[tokens_UT[is_token_UT]] = offset + is_token_UT.flatten().nonzero()[:, 0]
    return Batch(tokens_UT.to(device), ~is_token_UT.to(device))
