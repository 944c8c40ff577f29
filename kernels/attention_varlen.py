"""Attention over shared prompts with the flash kernels of `torch.nn.attention.varlen`: one call for a pack.

Every prompt and every completion is a sequence of queries, in the pack's order, so queries are not moved. A prompt's keys are
its tokens. A completion's keys are its prompt's tokens followed by its own, so keys and values are gathered (they have few
heads). The kernel's causal mask is aligned at the end: a sequence's last query sees all its keys, the one before it one less.

Shapes: L tokens of the pack, N gathered keys, M sequences, H query heads, K key heads, D head dimension, P tokens of a prompt,
U occurrences of a prompt among the gathered keys.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from .device import is_ampere


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """The kernel's sequences and their keys.

    Attributes:
        query_starts, key_starts: first query and first key of each sequence, and the end, [M + 1] int32.
        longest_query, longest_key: of all sequences.
        key_tokens: the pack's token of each gathered key, [N].
        own_keys: index among the N of each token as a key of its own sequence, [L].
        prompts: for each group the slice of its prompt, and the indices among the N at which completions repeat it, [U, P].
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int
    key_tokens: torch.Tensor
    own_keys: torch.Tensor
    prompts: tuple[tuple[slice, torch.Tensor], ...]


def plan_sequences(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> SequencePlan:
    """From (prompt length, completion lengths) of each group, in the pack's order. Completions may be empty."""
    query_starts, key_starts = [0], [0]
    key_tokens: list[int] = []
    own_keys: list[int] = []
    prompts: list[tuple[slice, torch.Tensor]] = []

    def add(prompt: range, length: int) -> None:
        first = query_starts[-1]
        own_keys.extend(range(key_starts[-1] + len(prompt), key_starts[-1] + len(prompt) + length))
        key_tokens.extend([*prompt, *range(first, first + length)])
        query_starts.append(first + length)
        key_starts.append(len(key_tokens))

    for prompt_length, completion_lengths in groups:
        prompt = range(query_starts[-1], query_starts[-1] + prompt_length)
        add(range(0), prompt_length)
        starts = []
        for length in completion_lengths:
            if length > 0:  # a sequence without queries needs no keys
                starts.append(key_starts[-1])
                add(prompt, length)
        places_UP = torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(prompt_length)
        prompts.append((slice(prompt.start, prompt.stop), places_UP.to(device)))
    queries, keys = (torch.tensor(starts, dtype=torch.int32) for starts in (query_starts, key_starts))
    return SequencePlan(
        query_starts=queries.to(device),
        key_starts=keys.to(device),
        longest_query=int(queries.diff().max()),
        longest_key=int(keys.diff().max()),
        key_tokens=torch.tensor(key_tokens, device=device),
        own_keys=torch.tensor(own_keys, device=device),
        prompts=tuple(prompts),
    )


def is_available_for(query_HLD: torch.Tensor) -> bool:
    """Whether the kernels support this query: fp16 or bf16, on Ampere or later, with a supported head dimension."""
    dim = query_HLD.shape[2]  # above 192 some devices lack the backward
    return dim % 8 == 0 and dim <= 192 and is_ampere(query_HLD)


def varlen_attention(
    query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, plan: SequencePlan, scaling: float
) -> torch.Tensor:
    """Attention in the plan's layout, [L, H, D] in the inputs' dtype."""
    key_NKD, value_NKD = (_Gather.apply(t.transpose(0, 1), plan) for t in (key_KLD, value_KLD))
    return varlen_attn(  # type: ignore[return-value]
        query_HLD.transpose(0, 1),
        key_NKD,
        value_NKD,
        cu_seq_q=plan.query_starts,
        cu_seq_k=plan.key_starts,
        max_q=plan.longest_query,
        max_k=plan.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        **_for_grouped_heads(varlen_attn, query_HLD.shape[0], key_KLD.shape[0]),
    )


def _for_grouped_heads(function: Callable[..., Any], heads: int, key_heads: int) -> dict[str, Any]:
    """The keyword that lets a key head serve several query heads: torch 2.11 has none, and always allows it."""
    return {"enable_gqa": heads != key_heads} if "enable_gqa" in _parameters(function) else {}


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


class _Gather(torch.autograd.Function):
    """[L, K, D] to [N, K, D]. Plain indexing would sum a prompt's gradients in bf16 and in no fixed order."""

    @staticmethod
    def forward(ctx: Any, rows_LKD: torch.Tensor, plan: SequencePlan) -> torch.Tensor:
        ctx.plan = plan
        return rows_LKD.index_select(0, plan.key_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_NKD,), plan = grads, ctx.plan
        wide = torch.promote_types(grad_NKD.dtype, torch.float32)
        grad_LKD = grad_NKD.index_select(0, plan.own_keys).to(wide)
        for prompt, places_UP in plan.prompts:
            copies = grad_NKD.index_select(0, places_UP.flatten()).view(*places_UP.shape, *grad_NKD.shape[1:])
            grad_LKD[prompt] += copies.sum(0, dtype=wide)
        return grad_LKD.to(grad_NKD.dtype), None
