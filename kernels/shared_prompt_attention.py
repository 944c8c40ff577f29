"""Attention over packs that contain each prompt once, followed by its completions.

A pack is one row of tokens: `[prompt | completion 1 | ... | completion G] [prompt | ...] ...`, without padding. The prompt
attends causally to itself; a completion attends to its prompt and, causally, to itself; position ids of every completion
start at the prompt's length. No other layer depends on the layout, so the function is registered with transformers'
`AttentionInterface` as `NAME`, and the layout is passed to the model's forward as the keyword `shared_prompt_layout`.

Shapes: L tokens of the pack, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from . import attention_varlen
from .attention_blocks import block_attention
from .attention_plan import BlockPlan, plan_blocks
from .attention_varlen import SequencePlan, plan_sequences, varlen_attention

NAME = "rankup_shared_prompt"
# Keywords that models of transformers use for more than causal attention: a cap on the scores, sinks, a window, a bias.
OTHER_KINDS = ("softcap", "s_aux", "sliding_window", "position_bias")


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One group's position in the pack: the slices of its prompt and of each completion, including empty ones."""

    prompt: slice
    completions: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class SharedPromptLayout:
    """The layout of a pack: its groups in order, `length` tokens in total.

    The plans for attention are computed on first use and shared by all layers.
    """

    groups: tuple[GroupLayout, ...]
    length: int
    device: torch.device | str = "cpu"
    _block_plans: dict[tuple[int, int], BlockPlan] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> SharedPromptLayout:
        """From (prompt length, completion lengths) of each group. Completions may be empty; prompts may not."""
        layouts = []
        end = 0
        for prompt_length, completion_lengths in groups:
            assert prompt_length > 0, "a prompt has at least one token"
            parts = []
            for length in (prompt_length, *completion_lengths):
                parts.append(slice(end, end + length))
                end += length
            layouts.append(GroupLayout(prompt=parts[0], completions=tuple(parts[1:])))
        return SharedPromptLayout(groups=tuple(layouts), length=end, device=device)

    def block_plan(self, heads: int, key_heads: int) -> BlockPlan:
        key = (heads, key_heads)
        if key not in self._block_plans:
            self._block_plans[key] = plan_blocks(self._lengths, heads, key_heads, self.device)
        return self._block_plans[key]

    @cached_property
    def sequence_plan(self) -> SequencePlan:
        return plan_sequences(self._lengths, self.device)

    @property
    def _lengths(self) -> list[tuple[int, list[int]]]:
        return [
            (group.prompt.stop - group.prompt.start, [part.stop - part.start for part in group.completions])
            for group in self.groups
        ]


def shared_prompt_attention(
    query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, layout: SharedPromptLayout, scaling: float | None
) -> torch.Tensor:
    """Exact attention for the layout. Query [H, L, D], key and value [K, L, D] with K dividing H; returns [L, H, D].

    If the flash kernels do not support the query (fp32, other devices), `block_attention` computes in plain torch, also without
    quadratic memory. On CPU torch's flash kernel would take 2 to 6 times as long.
    """
    scale: float = query_HLD.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_varlen.is_available_for(query_HLD):
        return varlen_attention(query_HLD, key_KLD, value_KLD, layout.sequence_plan, scale)
    plan = layout.block_plan(query_HLD.shape[0], key_KLD.shape[0])
    return block_attention(query_HLD, key_KLD, value_KLD, plan, scale)


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
    """`shared_prompt_attention` with transformers' calling convention: [1, heads, L, D] in, [1, L, H, D] out.

    Raises:
        ValueError: the model needs another kind of attention.
    """
    unsupported = [name for name in OTHER_KINDS if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"{type(module).__name__} uses attention with {unsupported[0]}: its prompts cannot be shared")
    assert query.shape[0] == 1 and query.shape[2] == shared_prompt_layout.length, "one pack at a time"
    assert dropout == 0.0, "with dropout the trained policy would not be the sampled one"
    return shared_prompt_attention(query[0], key[0], value[0], shared_prompt_layout, scaling)[None], None


def register() -> None:
    """Register `attn_implementation=NAME` with transformers. The layout replaces the mask, so none is built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, transformers_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
