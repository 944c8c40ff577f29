"""From groups to packs: each prompt once, followed by its completions, under a token budget.

    packs = pack(groups, tokens_per_pack=4096)                 # shared prompts, see kernels/shared_prompt_attention.py
    packs = pad(groups, tokens_per_pack=4096, pad_token_id=0)  # one row per completion, for models that cannot share prompts

Both layouts hold the same targets, so everything after the forward pass is the same. Only sampled tokens are targets. Tokens
that were given to an episode (results of tools, a user's turn) are inputs like those of the prompt, so nothing after the
forward pass has to know of them. A completion's inputs end before its last sampled token: nothing is predicted from what
follows.

Legend: L tokens of a pack, N targets (all sampled tokens of the pack), S completions (sequences) of the pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.repeated_rows import RowCopies
from ...kernels.shared_prompt_attention import SharedPromptLayout
from ...rollout.types import Completion
from ..data.groups import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """The input of one forward and backward pass, and its targets.

    Attributes:
        input_ids: [1, L] with shared prompts, [rows, width] padded.
        position_ids, layout: of shared prompts; None in a padded pack.
        attention_mask: of a padded pack, [rows, width]; None with shared prompts.
        sources: the hidden state (flattened to [L, D]) that predicts each target.
        targets_N: token ids to predict.
        advantages_N, sampler_logprobs_N: float32, for each target.
        sequence_N: which completion of the pack each target belongs to.
        lengths_S: how many tokens of each completion were sampled.
        routed_experts: the experts that the sampler chose for each of the L tokens, [L, layers, K] int16, -1 where that is not
            known; None if it is known of no token. With shared prompts, a prompt's are those of its first completion.
        origins: origin of each of the S completions: (index of its group, index in the group).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    layout: SharedPromptLayout | None = None
    attention_mask: torch.Tensor | None = None
    sources: RowCopies
    targets_N: torch.Tensor
    advantages_N: torch.Tensor
    sampler_logprobs_N: torch.Tensor
    sequence_N: torch.Tensor
    lengths_S: torch.Tensor
    routed_experts: torch.Tensor | None = None
    origins: tuple[tuple[int, int], ...]
    num_input_tokens: int
    num_padding_tokens: int


def pack(groups: Iterable[Group], *, tokens_per_pack: int, device: str = "cpu") -> list[Pack]:
    """Packs with shared prompts, by first-fit decreasing (at most 11/9 of the fewest possible packs, plus one).

    A group beyond the budget is split; only then is its prompt repeated. Only a single completion that alone with its prompt
    exceeds the budget makes a pack larger than `tokens_per_pack`.
    """
    parts = [part for group in _parts(groups) for part in _split(group, tokens_per_pack)]
    return [_shared_pack(batch, device) for batch in _first_fit_decreasing(parts, tokens_per_pack)]


def pad(
    groups: Iterable[Group], *, tokens_per_pack: int, pad_token_id: int, device: str = "cpu"
) -> list[Pack]:
    """Padded packs: one row for each completion, prompt repeated, padded on the right to the pack's longest row.

    Rows of similar length are packed together, so there is little padding. Padding counts towards the budget: only a single
    row that alone exceeds it makes a pack larger than `tokens_per_pack`.
    """
    rows = [_Part(part.place, part.group, (pick,)) for part in _parts(groups) for pick in part.picks]
    return [_padded_pack(batch, pad_token_id, device) for batch in _of_like_length(rows, tokens_per_pack)]


def by_origin(packs: Sequence[Pack], values: Sequence[torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """Per-target values of each pack [N], split into one tensor for each completion, by its origin."""
    return {
        origin: piece
        for one, values_N in zip(packs, values, strict=True)
        for origin, piece in zip(one.origins, values_N.split(one.lengths_S.tolist()), strict=True)
    }


def by_completion(packs: Sequence[Pack], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Split per-target values of each pack [N] into one tensor for each completion, in the order of the groups.

    Completions without targets are left out, as in `pack` and `pad`.
    """
    pieces = by_origin(packs, values)
    return [pieces[origin] for origin in sorted(pieces)]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some completions (`picks`, by their places) of the group at `place`, behind its prompt."""

    place: int
    group: Group
    picks: tuple[int, ...]

    @property
    def prompt(self) -> Sequence[int]:
        return self.group.prompt.token_ids

    @property
    def completions(self) -> list[Completion]:
        return [self.group.completions[i] for i in self.picks]

    @property
    def size(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt) + sum(len(row_inputs(c)) for c in self.completions)


def row_inputs(completion: Completion) -> Sequence[int]:
    """The tokens of a completion that go through the model: all before its last sampled token."""
    return completion.token_ids[: completion.spans[-1][1] - 1]


def has_targets(completion: Completion) -> bool:
    """Whether there is something to train on: not if it was aborted immediately, nor if it is void."""
    return bool(completion.logprobs) and not completion.is_void


def _parts(groups: Iterable[Group]) -> Iterator[_Part]:
    """One part for each group. Completions without targets are left out."""
    for place, group in enumerate(groups):
        picks = tuple(i for i, completion in enumerate(group.completions) if has_targets(completion))
        if picks:
            yield _Part(place, group, picks)


def _split(part: _Part, budget: int) -> Iterator[_Part]:
    """The part, or several smaller ones that fit the budget."""
    picks: tuple[int, ...] = ()
    size = len(part.prompt)
    for pick in part.picks:
        added = len(row_inputs(part.group.completions[pick]))
        if picks and size + added > budget:
            yield _Part(part.place, part.group, picks)
            picks, size = (), len(part.prompt)
        picks, size = (*picks, pick), size + added
    yield _Part(part.place, part.group, picks)


def _first_fit_decreasing(parts: Sequence[_Part], budget: int) -> list[list[_Part]]:
    """Put each part, largest first, into the first pack with room; a pack keeps the order of the groups."""
    packs: list[list[_Part]] = []
    room: list[int] = []
    for part in sorted(parts, key=lambda one: -one.size):
        index = next((i for i, left in enumerate(room) if part.size <= left), len(packs))
        if index == len(packs):
            packs.append([])
            room.append(budget)
        packs[index].append(part)
        room[index] -= part.size
    return [sorted(batch, key=lambda one: (one.place, one.picks)) for batch in packs]


def _of_like_length(rows: Sequence[_Part], budget: int) -> Iterator[list[_Part]]:
    """Rows by descending length, as many in a pack as the budget holds at the longest row."""
    pending: list[_Part] = []
    for row in sorted(rows, key=lambda one: -one.size):
        if pending and (len(pending) + 1) * pending[0].size > budget:
            yield pending
            pending = []
        pending.append(row)
    if pending:
        yield pending


def _shared_pack(parts: list[_Part], device: str) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    shapes: list[tuple[int, list[int]]] = []
    for part in parts:
        prompt, completions = part.prompt, part.completions
        last_of_prompt = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        shapes.append((len(prompt), [len(row_inputs(c)) for c in completions]))
        for completion in completions:
            inputs = row_inputs(completion)
            # The first token is predicted from the prompt's last one, each later token from the one before it.
            source += [len(ids) + i - 1 if i else last_of_prompt for i in completion.sampled]
            ids += inputs
            positions += range(len(prompt), len(prompt) + len(inputs))
    return _make_pack(
        parts,
        source,
        device,
        routed_experts=_experts([piece for part in parts for piece in _pieces(part)], device),
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        layout=SharedPromptLayout.build(shapes, device),
        num_input_tokens=len(ids),
    )


def _padded_pack(parts: list[_Part], pad_token_id: int, device: str) -> Pack:
    pairs = [(part.prompt, completion) for part in parts for completion in part.completions]
    assert len(pairs) == len(parts), "one completion in each part"
    rows = [[*prompt, *row_inputs(completion)] for prompt, completion in pairs]
    width = max(map(len, rows))
    source: list[int] = []
    for index, (prompt, completion) in enumerate(pairs):
        source += [index * width + len(prompt) + i - 1 for i in completion.sampled]
    padding = [width - len(row) for row in rows]
    pieces = [(c.routed_experts, slice(len(row)), width) for (_, c), row in zip(pairs, rows, strict=True)]
    return _make_pack(
        parts,
        source,
        device,
        routed_experts=_experts(pieces, device),
        input_ids=torch.tensor([row + [pad_token_id] * n for row, n in zip(rows, padding, strict=True)], device=device),
        attention_mask=torch.tensor([[1] * len(r) + [0] * n for r, n in zip(rows, padding, strict=True)], device=device),
        num_input_tokens=sum(map(len, rows)),
        num_padding_tokens=sum(padding),
    )


_Piece = tuple[np.ndarray | None, slice, int]
"""Experts of a completion, the range of its tokens that a piece of a pack has, and the piece's length with padding."""


def _pieces(part: _Part) -> Iterator[_Piece]:
    """The prompt, whose experts are those of a completion that has any, and each completion."""
    prompt, completions = len(part.prompt), part.completions
    known = [c.routed_experts for c in completions if c.routed_experts is not None]
    yield known[0] if known else None, slice(prompt), prompt
    for completion in completions:
        length = len(row_inputs(completion))
        yield completion.routed_experts, slice(prompt, prompt + length), length


def _experts(pieces: Sequence[_Piece], device: str) -> torch.Tensor | None:
    """See `Pack.routed_experts`."""
    shapes = {experts.shape[1:] for experts, _, _ in pieces if experts is not None}
    if not shapes:
        return None
    (shape,) = shapes
    found = np.full((sum(length for *_, length in pieces), *shape), -1, dtype=np.int16)
    start = 0
    for experts, tokens, length in pieces:
        if experts is not None:
            rows = experts[tokens]
            assert len(rows) == tokens.stop - (tokens.start or 0), "the experts of every token that is an input"
            found[start : start + len(rows)] = rows
        start += length
    return torch.from_numpy(found).to(device)


def _make_pack(
    parts: list[_Part],
    source: list[int],
    device: str,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    layout: SharedPromptLayout | None = None,
    attention_mask: torch.Tensor | None = None,
    routed_experts: torch.Tensor | None,
    num_input_tokens: int,
    num_padding_tokens: int = 0,
) -> Pack:
    """The pack with its targets, the same for both layouts."""
    completions = [completion for part in parts for completion in part.completions]
    advantages_S = torch.tensor([part.group.advantages[i] for part in parts for i in part.picks], dtype=torch.float32)
    lengths_S = torch.tensor([len(c.logprobs) for c in completions])
    sequence_N = torch.arange(len(completions)).repeat_interleave(lengths_S)
    targets_N = torch.tensor([c.token_ids[i] for c in completions for i in c.sampled])
    assert len(source) == len(targets_N), "one hidden state for each target"
    return Pack(
        input_ids=input_ids,
        position_ids=position_ids,
        layout=layout,
        attention_mask=attention_mask,
        sources=RowCopies(source, num_input_tokens + num_padding_tokens, device),
        targets_N=targets_N.to(device),
        advantages_N=advantages_S[sequence_N].to(device),
        sampler_logprobs_N=torch.tensor([lp for c in completions for lp in c.logprobs], dtype=torch.float32, device=device),
        sequence_N=sequence_N.to(device),
        lengths_S=lengths_S.to(device),
        routed_experts=routed_experts,
        origins=tuple((part.place, i) for part in parts for i in part.picks),
        num_input_tokens=num_input_tokens,
        num_padding_tokens=num_padding_tokens,
    )
