"""Attention over packs in which each prompt stands once, followed by its completions.

A pack is one row of tokens: `[prompt | completion 1 | ... | completion G] [prompt | ...] ...`, without padding. The prompt
attends causally to itself; a completion attends to its prompt and, causally, to itself; position ids of every completion
start at the prompt's length. Attention is the only layer that has to know, so the function is registered with transformers'
`AttentionInterface` as `NAME`, and the layout goes through the model's forward as the keyword `shared_prompt_layout`.

Legend: L tokens of the pack, P prompt tokens, G completions, C tokens of the longest completion, H query heads, K key/value
heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "rankup_shared_prompt"
SCORES_LIMIT = 2**25  # elements: a layer keeps them for the backward, 2 bytes each in bf16


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Where one group lies in the pack.

    `prompt` is the slice of the prompt's tokens. `padded_GC` gives the place of every completion token, completions as rows;
    a row shorter than C repeats the prompt's first place, which later tokens alone could see, and there are none.
    `real` holds the flat places in [G*C] that are tokens, in pack order, and `completions` the slice that they fill.
    """

    prompt: slice
    completions: slice
    padded_GC: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True, slots=True)
class SharedPromptLayout:
    """The layout of a whole pack: its groups in order, `length` tokens in all."""

    groups: tuple[GroupLayout, ...]
    length: int

    @staticmethod
    def build(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> SharedPromptLayout:
        """From (prompt length, completion lengths) of each group. Completions may be empty; prompts may not."""
        layouts = []
        start = 0
        for prompt_length, completion_lengths in groups:
            assert prompt_length > 0, "a prompt has at least one token"
            lengths = torch.tensor(list(completion_lengths), dtype=torch.long)
            widest = int(lengths.max()) if len(lengths) else 0
            columns_C = torch.arange(widest)
            is_token_GC = columns_C < lengths[:, None]
            first_G = start + prompt_length + lengths.cumsum(0) - lengths
            padded_GC = torch.where(is_token_GC, first_G[:, None] + columns_C, start)
            end = start + prompt_length + int(lengths.sum())
            layouts.append(
                GroupLayout(
                    prompt=slice(start, start + prompt_length),
                    completions=slice(start + prompt_length, end),
                    padded_GC=padded_GC.to(device),
                    real=is_token_GC.flatten().nonzero()[:, 0].to(device),
                )
            )
            start = end
        return SharedPromptLayout(groups=tuple(layouts), length=start)


def shared_prompt_attention(
    query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, layout: SharedPromptLayout, scaling: float | None
) -> torch.Tensor:
    """Exact attention for the layout. Query [H, L, D], key and value [K, L, D] with K dividing H; returns [L, H, D].

    Two products a group: the prompt by itself, and all completions as a batch of G whose keys are the prompt's followed by
    their own.
    """
    scale: float = query_HLD.shape[-1] ** -0.5 if scaling is None else scaling
    pieces = []
    for group in layout.groups:
        prompt = (t[None, :, group.prompt] for t in (query_HLD, key_KLD, value_KLD))
        pieces.append(_attend(*prompt, scaling=scale)[0].transpose(0, 1))
        if group.completions.start < group.completions.stop:
            pieces.append(_completions_attention(query_HLD, key_KLD, value_KLD, group, scale))
    return torch.cat(pieces)


def _completions_attention(
    query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, group: GroupLayout, scaling: float
) -> torch.Tensor:
    """The completions of one group, [their tokens, H, D], in pack order."""
    count = group.padded_GC.shape[0]

    def own(t: torch.Tensor) -> torch.Tensor:  # [heads, L, D] -> [G, heads, C, D]
        return t[:, group.padded_GC].transpose(0, 1)

    def with_prompt(t: torch.Tensor) -> torch.Tensor:  # [K, L, D] -> [G, K, P + C, D]
        return torch.cat([t[:, group.prompt].expand(count, -1, -1, -1), own(t)], dim=2)

    out_GHCD = _attend(own(query_HLD), with_prompt(key_KLD), with_prompt(value_KLD), scaling=scaling)
    return out_GHCD.transpose(1, 2).flatten(0, 1)[group.real]


def _attend(query_BHCD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Causal attention, aligned at the end: the last query sees all S keys, the one before it S - 1. Returns [B, H, C, D].

    On CPU, scores that fit into `SCORES_LIMIT` are formed outright: torch's blocked kernel takes 2 to 6 times as long there,
    most of it in the backward.
    """
    batch, heads, rows, dim = query_BHCD.shape
    columns = key_BKSD.shape[2]
    if query_BHCD.device.type != "cpu" or batch * heads * rows * columns > SCORES_LIMIT:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query_BHCD.device).tril(columns - rows)
        return scaled_dot_product_attention(
            query_BHCD, key_BKSD, value_BKSD, attn_mask=mask, scale=scaling, enable_gqa=heads != key_BKSD.shape[1]
        )
    # Heads that share a key head are rows of one product: keys and values are not repeated.
    folded = (-1, heads // key_BKSD.shape[1] * rows, dim)
    scores = torch.bmm(query_BHCD.reshape(folded), key_BKSD.reshape(-1, columns, dim).transpose(1, 2))
    future = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu(columns - rows + 1)
    scores = scores.view(batch, heads, rows, columns).to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(query_BHCD.dtype)
    out = torch.bmm(weights.view(*folded[:2], columns), value_BKSD.reshape(-1, columns, dim))
    return out.view(batch, heads, rows, dim)


def transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    shared_prompt_layout: SharedPromptLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`shared_prompt_attention` in the form that transformers calls: [1, heads, L, D] in, [1, L, H, D] out."""
    assert query.shape[0] == 1 and query.shape[2] == shared_prompt_layout.length, "one pack at a time"
    assert dropout == 0.0, "dropout would make trainer and sampler two policies"
    return shared_prompt_attention(query[0], key[0], value[0], shared_prompt_layout, scaling)[None], None


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. The layout says all, so no mask is built for it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, transformers_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
