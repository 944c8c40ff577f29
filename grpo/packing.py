"""From groups to packs: each prompt once, followed by its completions, under a token budget.

    packs = pack(groups, tokens_per_pack=4096)                 # one row of tokens each, see kernels/shared_prompt_attention
    packs = pad(groups, tokens_per_pack=4096, pad_token_id=0)  # the plain layout, for models whose layers forbid the other

Both layouts hold the same targets in the same order, so everything after the forward is the same. A completion's last token
is a target but never an input: nothing is predicted from it.

Legend: L tokens of a pack, N targets (all completion tokens of the pack), S completions (sequences) of the pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.shared_prompt_attention import SharedPromptLayout
from ..rollout.types import Completion, PromptGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """A group with one advantage a completion."""

    group: PromptGroup
    advantages: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """What one forward and backward see.

    `model_inputs` are the keyword arguments of the model; the hidden states they give, flattened to [L, D], are read at
    `source_N` to predict `targets_N`. Per target: `advantages_N`, the sampler's `sampler_logprobs_N`, and `sequence_N`, which
    completion of the pack it belongs to; `lengths_S` are the completions' lengths in tokens.
    """

    model_inputs: dict[str, Any]
    source_N: torch.Tensor
    targets_N: torch.Tensor
    advantages_N: torch.Tensor
    sampler_logprobs_N: torch.Tensor
    sequence_N: torch.Tensor
    lengths_S: torch.Tensor
    num_input_tokens: int
    num_padding_tokens: int


def pack(groups: Iterable[WeightedGroup], *, tokens_per_pack: int, device: str = "cpu") -> list[Pack]:
    """Packs in the shared-prompt layout. A group beyond the budget is split; only then is its prompt repeated.

    Only a single completion that alone with its prompt exceeds the budget makes a pack larger than `tokens_per_pack`.
    """
    return [_shared_pack(batch, device) for batch in _batches(groups, tokens_per_pack, _shared_size)]


def pad(
    groups: Iterable[WeightedGroup], *, tokens_per_pack: int, pad_token_id: int, device: str = "cpu"
) -> list[Pack]:
    """Packs in the plain layout: one row a completion, prompt repeated, padded on the right to the pack's longest row.

    Padding counts: only a single row that alone exceeds the budget makes a pack larger than `tokens_per_pack`.
    """
    return [_padded_pack(batch, pad_token_id, device) for batch in _batches(groups, tokens_per_pack, _padded_size)]


def _inputs(completion: Completion) -> Sequence[int]:
    return completion.token_ids[:-1]


def _shared_size(groups: Sequence[WeightedGroup]) -> int:
    """Tokens of one pack of the groups in the shared-prompt layout."""
    return sum(len(w.group.prompt_token_ids) + sum(len(_inputs(c)) for c in w.group.completions) for w in groups)


def _padded_size(groups: Sequence[WeightedGroup]) -> int:
    """Tokens of one pack of the groups in the plain layout, padding included."""
    widths = [len(w.group.prompt_token_ids) + len(_inputs(c)) for w in groups for c in w.group.completions]
    return len(widths) * max(widths)


Size = Callable[[Sequence[WeightedGroup]], int]


def _batches(groups: Iterable[WeightedGroup], budget: int, size: Size) -> Iterator[list[WeightedGroup]]:
    """The groups of each pack in turn: as many as the budget holds."""
    pending: list[WeightedGroup] = []
    for part in _split_groups(groups, budget, size):
        if pending and size([*pending, part]) > budget:
            yield pending
            pending = []
        pending.append(part)
    if pending:
        yield pending


def _split_groups(groups: Iterable[WeightedGroup], budget: int, size: Size) -> Iterator[WeightedGroup]:
    """Groups as they are, or in as many parts as the budget asks for; empty completions (aborted at once) are left out."""
    for weighted in groups:
        part: list[tuple[Completion, float]] = []
        for pair in zip(weighted.group.completions, weighted.advantages, strict=True):
            if not pair[0].token_ids:
                continue
            if part and size([_part(weighted, [*part, pair])]) > budget:
                yield _part(weighted, part)
                part = []
            part.append(pair)
        if part:
            yield _part(weighted, part)


def _part(weighted: WeightedGroup, kept: list[tuple[Completion, float]]) -> WeightedGroup:
    completions, advantages = zip(*kept, strict=True)
    group = PromptGroup(
        index=weighted.group.index, prompt_token_ids=weighted.group.prompt_token_ids, completions=completions
    )
    return WeightedGroup(group=group, advantages=advantages)


def _shared_pack(groups: list[WeightedGroup], device: str) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    shapes: list[tuple[int, list[int]]] = []
    for weighted in groups:
        prompt = weighted.group.prompt_token_ids
        last_of_prompt = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        shapes.append((len(prompt), [len(_inputs(c)) for c in weighted.group.completions]))
        for completion in weighted.group.completions:
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
        model_inputs=inputs_1L, num_input_tokens=len(ids), num_padding_tokens=0, **_targets(groups, source, device)
    )


def _padded_pack(groups: list[WeightedGroup], pad_token_id: int, device: str) -> Pack:
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    for weighted in groups:
        prompt = weighted.group.prompt_token_ids
        rows += [[*prompt, *_inputs(c)] for c in weighted.group.completions]
        prompt_lengths += [len(prompt)] * len(weighted.group.completions)
    width = max(map(len, rows))
    source: list[int] = []
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        source += range(index * width + prompt_length - 1, index * width + len(row))
    padding = [width - len(row) for row in rows]
    model_inputs = {
        "input_ids": torch.tensor([row + [pad_token_id] * n for row, n in zip(rows, padding, strict=True)], device=device),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * n for r, n in zip(rows, padding, strict=True)], device=device),
    }
    return Pack(
        model_inputs=model_inputs,
        num_input_tokens=sum(map(len, rows)),
        num_padding_tokens=sum(padding),
        **_targets(groups, source, device),
    )


def _targets(groups: list[WeightedGroup], source: list[int], device: str) -> dict[str, torch.Tensor]:
    completions = [c for weighted in groups for c in weighted.group.completions]
    advantages_S = [a for weighted in groups for a in weighted.advantages]
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
    return {name: tensor.to(device) for name, tensor in tensors.items()}
