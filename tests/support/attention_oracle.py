"""Reference for attention over shared prompts: which tokens each token sees, and plain attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

Groups = list[tuple[int, list[int]]]  # (prompt length, completion lengths) of each
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Ragged packs: prompts of one token, empty completions, groups without completions.
GROUPS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 6), max_size=5)), min_size=1, max_size=4)
HEADS = st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (6, 2), (3, 1), (9, 3)])  # query heads, key heads


def pack_length(groups: Groups) -> int:
    return sum(prompt + sum(completions) for prompt, completions in groups)


def random_qkv(groups: Groups, heads: int, key_heads: int, *, dim: int = 4, dtype: torch.dtype = torch.float64) -> QKV:
    """Query [H, L, D], key and value [K, L, D]: leaves whose memory layout is that of projections, [L, heads, D]."""
    length = pack_length(groups)
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(length, count, dim, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )
    return query, key, value


@dataclass(frozen=True)
class Kind:
    """What a layer does besides causal attention: it sees `window` positions, caps its scores, has a sink for each head."""

    window: int | None = None
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None


PLAIN = Kind()


def row_by_row_attention(qkv: QKV, groups: Groups, scaling: float, kind: Kind = PLAIN) -> torch.Tensor:
    """Every prompt, and every completion behind its prompt, as a separate row with a causal mask. Returns [L, H, D]."""
    outputs = []
    end = 0
    for prompt_length, completion_lengths in groups:
        prompt = list(range(end, end + prompt_length))
        outputs.append(_causal_attention(qkv, prompt, scaling, kind))
        end += prompt_length
        for length in completion_lengths:
            row = prompt + list(range(end, end + length))
            outputs.append(_causal_attention(qkv, row, scaling, kind)[prompt_length:])
            end += length
    return torch.cat(outputs)


def _causal_attention(qkv: QKV, tokens: list[int], scaling: float, kind: Kind) -> torch.Tensor:
    query, key, value = (t[:, tokens] for t in qkv)
    mask_LL = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    if kind.window is not None:
        mask_LL = mask_LL.triu(1 - kind.window)
    return masked_attention((query, key, value), mask_LL, scaling, kind)


def masked_attention(qkv: QKV, mask_LL: torch.Tensor, scaling: float, kind: Kind = PLAIN) -> torch.Tensor:
    """transformers' eager attention. A row of the mask is True at the tokens that it sees. Returns [L, H, D]."""
    query_HLD, *keys_and_values = qkv
    key_HLD, value_HLD = (t.repeat_interleave(len(query_HLD) // len(t), dim=0) for t in keys_and_values)
    scores = query_HLD @ key_HLD.transpose(1, 2) * scaling
    if kind.softcap is not None:
        scores = (scores / kind.softcap).tanh() * kind.softcap
    scores = scores.masked_fill(~mask_LL, float("-inf"))
    if kind.sinks_H is not None:
        scores = torch.cat([scores, kind.sinks_H.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query_HLD.dtype)[..., : mask_LL.shape[1]]
    return (weights @ value_HLD).transpose(0, 1)


def visible(groups: Groups) -> torch.Tensor:
    """Mask [L, L] over the pack, True if the row's token sees the column's."""
    kinds = []  # for each token (group, completion), None for the prompt
    for index, (prompt_length, completion_lengths) in enumerate(groups):
        kinds += [(index, None)] * prompt_length
        kinds += [(index, number) for number, length in enumerate(completion_lengths) for _ in range(length)]
    return torch.tensor(
        [
            [column <= row and kind[0] == other[0] and other[1] in (None, kind[1]) for column, other in enumerate(kinds)]
            for row, kind in enumerate(kinds)
        ]
    )
