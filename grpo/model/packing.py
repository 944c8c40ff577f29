"""From groups to packs: each prompt once, followed by its completions, under a token budget.

    packs = pack(groups, tokens_per_pack=4096)                 # one row of tokens each, see kernels/shared_prompt_attention
    packs = pad(groups, tokens_per_pack=4096, pad_token_id=0)  # the plain layout, for models whose layers forbid the other

Both layouts hold the same targets, so everything after the forward is the same. A completion's last token is a target but never
an input: nothing is predicted from it.

Legend: L tokens of a pack, N targets (all completion tokens of the pack), S completions (sequences) of the pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.shared_prompt_attention import SharedPromptLayout
from ...rollout.types import Completion, PromptGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """A group with one advantage a completion. `is_own`: whether its tokens are here, or with another worker."""

    group: PromptGroup
    advantages: tuple[float, ...]
    is_own: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """What one forward and backward see.

    `model_inputs` are the keyword arguments of the model; the hidden states they give, flattened to [L, D], are read at
    `source_N` to predict `targets_N`. Per target: `advantages_N`, the sampler's `sampler_logprobs_N`, and `sequence_N`, which
    completion of the pack it belongs to; `lengths_S` are the completions' lengths in tokens. `origins` tells where each of the
    S completions stood in what was packed: (place of the group, place in the group).
    """

    model_inputs: dict[str, Any]
    source_N: torch.Tensor
    targets_N: torch.Tensor
    advantages_N: torch.Tensor
    sampler_logprobs_N: torch.Tensor
    sequence_N: torch.Tensor
    lengths_S: torch.Tensor
    origins: tuple[tuple[int, int], ...]
    num_input_tokens: int
    num_padding_tokens: int


def pack(groups: Iterable[WeightedGroup], *, tokens_per_pack: int, device: str = "cpu") -> list[Pack]:
    """Packs in the shared-prompt layout, as few as first-fit decreasing makes (within 11/9 of the fewest possible, plus one).

    A group beyond the budget is split; only then is its prompt repeated. Only a single completion that alone with its prompt
    exceeds the budget makes a pack larger than `tokens_per_pack`.
    """
    parts = [part for whole in _wholes(groups) for part in _split(whole, tokens_per_pack)]
    return [_shared_pack(batch, device) for batch in _first_fit_decreasing(parts, tokens_per_pack)]


def pad(
    groups: Iterable[WeightedGroup], *, tokens_per_pack: int, pad_token_id: int, device: str = "cpu"
) -> list[Pack]:
    """Packs in the plain layout: one row a completion, prompt repeated, padded on the right to the pack's longest row.

    Rows of like length stand together, so little is padding. It counts towards the budget: only a single row that alone
    exceeds it makes a pack larger than `tokens_per_pack`.
    """
    rows = [_Part(whole.place, whole.weighted, (pick,)) for whole in _wholes(groups) for pick in whole.picks]
    return [_padded_pack(batch, pad_token_id, device) for batch in _of_like_length(rows, tokens_per_pack)]


def by_completion(packs: Sequence[Pack], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Per-target values of each pack [N] as one tensor a completion, in the order in which the completions were given.

    Completions without tokens are left out, as they are by `pack` and `pad`.
    """
    pieces = {
        origin: piece
        for one, values_N in zip(packs, values, strict=True)
        for origin, piece in zip(one.origins, values_N.split(one.lengths_S.tolist()), strict=True)
    }
    return [pieces[origin] for origin in sorted(pieces)]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some completions of the group at `place`, by their numbers, behind its prompt."""

    place: int
    weighted: WeightedGroup
    picks: tuple[int, ...]

    @property
    def prompt(self) -> Sequence[int]:
        return self.weighted.group.prompt_token_ids

    @property
    def completions(self) -> list[Completion]:
        return [self.weighted.group.completions[i] for i in self.picks]

    @property
    def size(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt) + sum(len(_inputs(c)) for c in self.completions)


def _inputs(completion: Completion) -> Sequence[int]:
    return completion.token_ids[:-1]


def _wholes(groups: Iterable[WeightedGroup]) -> Iterator[_Part]:
    """The groups without empty completions (aborted at once), and without those that have no other."""
    for place, weighted in enumerate(groups):
        picks = tuple(i for i, completion in enumerate(weighted.group.completions) if completion.token_ids)
        if picks:
            yield _Part(place, weighted, picks)


def _split(whole: _Part, budget: int) -> Iterator[_Part]:
    """The part as it is, or in as many parts as the budget asks for."""
    picks: tuple[int, ...] = ()
    size = len(whole.prompt)
    for pick in whole.picks:
        added = len(_inputs(whole.weighted.group.completions[pick]))
        if picks and size + added > budget:
            yield _Part(whole.place, whole.weighted, picks)
            picks, size = (), len(whole.prompt)
        picks, size = (*picks, pick), size + added
    yield _Part(whole.place, whole.weighted, picks)


def _first_fit_decreasing(parts: Sequence[_Part], budget: int) -> list[list[_Part]]:
    """Each part, the largest first, into the first pack that has room; within a pack in the order given."""
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
    """Rows by falling length, as many a pack as the budget holds at its longest."""
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
        shapes.append((len(prompt), [len(_inputs(c)) for c in completions]))
        for completion in completions:
            inputs = _inputs(completion)
            # The first token is predicted from the prompt's last one, each later token from the one before it.
            source += [last_of_prompt, *range(len(ids), len(ids) + len(inputs))]
            ids += inputs
            positions += range(len(prompt), len(prompt) + len(inputs))
    inputs_1L = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "shared_prompt_layout": SharedPromptLayout.build(shapes, device),
    }
    return Pack(
        model_inputs=inputs_1L, num_input_tokens=len(ids), num_padding_tokens=0, **_targets(parts, source, device)
    )


def _padded_pack(parts: list[_Part], pad_token_id: int, device: str) -> Pack:
    rows = [[*part.prompt, *_inputs(completion)] for part in parts for completion in part.completions]
    assert len(rows) == len(parts), "one completion a part"
    width = max(map(len, rows))
    source: list[int] = []
    for index, (row, part) in enumerate(zip(rows, parts, strict=True)):
        source += range(index * width + len(part.prompt) - 1, index * width + len(row))
    padding = [width - len(row) for row in rows]
    model_inputs = {
        "input_ids": torch.tensor([row + [pad_token_id] * n for row, n in zip(rows, padding, strict=True)], device=device),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * n for r, n in zip(rows, padding, strict=True)], device=device),
    }
    return Pack(
        model_inputs=model_inputs,
        num_input_tokens=sum(map(len, rows)),
        num_padding_tokens=sum(padding),
        **_targets(parts, source, device),
    )


def _targets(parts: list[_Part], source: list[int], device: str) -> dict[str, Any]:
    completions = [completion for part in parts for completion in part.completions]
    advantages_S = [part.weighted.advantages[i] for part in parts for i in part.picks]
    lengths_S = torch.tensor([len(c.token_ids) for c in completions])
    sequence_N = torch.arange(len(completions)).repeat_interleave(lengths_S)
    tensors = {
        "source_N": torch.tensor(source),
        "targets_N": torch.tensor([token for c in completions for token in c.token_ids]),
        "advantages_N": torch.tensor(advantages_S, dtype=torch.float32)[sequence_N],
        "sampler_logprobs_N": torch.tensor([lp for c in completions for lp in c.logprobs], dtype=torch.float32),
        "sequence_N": sequence_N,
        "lengths_S": lengths_S,
    }
    assert len(source) == len(tensors["targets_N"]), "one hidden state a target"
    origins = tuple((part.place, i) for part in parts for i in part.picks)
    return {"origins": origins, **{name: tensor.to(device) for name, tensor in tensors.items()}}
