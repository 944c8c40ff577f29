"""Attention over packs that contain each prompt once, followed by its completions.

A pack is one row of tokens: `[prompt | completion 1 | ... | completion G] [prompt | ...] ...`, without padding. The prompt
attends causally to itself; a completion attends to its prompt and, causally, to itself; position ids of every completion
start at the prompt's length. A sliding window, a cap on the scores and sinks are part of it. The function is registered with
transformers' `AttentionInterface` as `NAME`; around forward and backward, `active(layout)` says what the pack looks like. Of
all other layers, only those with a state depend on it: see `shared_prompt_recurrence.py`.

Shapes: L tokens of the pack, H query heads, K key/value heads, D head dimension of queries and keys, E of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from . import attention_varlen
from .attention_blocks import block_attention
from .attention_plan import BlockPlan, plan_blocks
from .attention_varlen import SequencePlan, plan_sequences, varlen_attention
from .recurrence_plan import RecurrencePlan, plan_recurrence

NAME = "rankup_shared_prompt"


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
    _block_plans: dict[tuple[int, int, int | None], BlockPlan] = field(default_factory=dict, repr=False)
    _sequence_plans: dict[int | None, SequencePlan] = field(default_factory=dict, repr=False)

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

    def block_plan(self, heads: int, key_heads: int, window: int | None = None) -> BlockPlan:
        key = (heads, key_heads, self._narrow(window))
        if key not in self._block_plans:
            self._block_plans[key] = plan_blocks(self._lengths, heads, key_heads, self.device, window=key[2])
        return self._block_plans[key]

    def sequence_plan(self, window: int | None = None) -> SequencePlan:
        window = self._narrow(window)
        if window not in self._sequence_plans:
            self._sequence_plans[window] = plan_sequences(self._lengths, self.device, window=window)
        return self._sequence_plans[window]

    @cached_property
    def recurrence_plan(self) -> RecurrencePlan:
        return plan_recurrence(self._lengths, self.device)

    def _narrow(self, window: int | None) -> int | None:
        """The window, or None if no sequence is longer, so that such layers share the plans of the others."""
        return window if window is not None and window < self._longest else None

    @cached_property
    def _longest(self) -> int:
        """Positions of the longest sequence: a prompt with the longest of its completions."""
        return max(prompt + max(completions, default=0) for prompt, completions in self._lengths)

    @property
    def _lengths(self) -> list[tuple[int, list[int]]]:
        return [
            (group.prompt.stop - group.prompt.start, [part.stop - part.start for part in group.completions])
            for group in self.groups
        ]


# One for the process, not for a thread: torch recomputes checkpointed layers in threads of its own.
_active: list[SharedPromptLayout] = []


@contextmanager
def active(layout: SharedPromptLayout | None) -> Iterator[None]:
    """Around the forward and the backward pass of a pack of this layout. None: rows as ever."""
    if layout is None:
        yield
        return
    assert not _active, "one pack at a time"
    _active.append(layout)
    try:
        yield
    finally:
        _active.clear()


def active_layout() -> SharedPromptLayout | None:
    """That of the pack that is computed now."""
    return _active[0] if _active else None


def shared_prompt_attention(
    query_HLD: torch.Tensor,
    key_KLD: torch.Tensor,
    value_KLD: torch.Tensor,
    layout: SharedPromptLayout,
    scaling: float | None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention for the layout. Query [H, L, D], key [K, L, D] and value [K, L, E], K dividing H; returns [L, H, E].

    If the flash kernels do not support it (fp32, other devices, a cap, sinks, E other than D), `block_attention` computes in
    plain torch, also without quadratic memory. On CPU torch's flash kernel would take 2 to 6 times as long.

    Args:
        scaling: of the scores; None: D ** -0.5.
        window: a token sees its own position and the `window - 1` before it; None: all before it.
        softcap, sinks_H: see `attention_blocks.py`.
    """
    scale: float = query_HLD.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = softcap is None and sinks_H is None and key_KLD.shape == value_KLD.shape
    if is_plain and attention_varlen.is_available_for(query_HLD):
        return varlen_attention(query_HLD, key_KLD, value_KLD, layout.sequence_plan(window), scale)
    plan = layout.block_plan(query_HLD.shape[0], key_KLD.shape[0], window)
    return block_attention(query_HLD, key_KLD, value_KLD, plan, scale, softcap=softcap, sinks_H=sinks_H)


def transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`shared_prompt_attention` of the active layout with transformers' calling convention: [1, heads, L, D] in, [1, L, H, E]
    out.

    Raises:
        ValueError: the model needs another kind of attention.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} uses attention with position_bias: its prompts cannot be shared")
    layout = active_layout()
    assert layout is not None, "within `active`"
    assert query.shape[0] == 1 and query.shape[2] == layout.length, "one pack at a time"
    assert dropout == 0.0, "with dropout the trained policy would not be the sampled one"
    output_LHD = shared_prompt_attention(
        query[0],
        key[0],
        value[0],
        layout,
        scaling,
        window=_window_of(module, sliding_window),
        softcap=softcap,
        sinks_H=s_aux,
    )
    return output_LHD[None], None


def _window_of(module: torch.nn.Module, given: int | None) -> int | None:
    """The window of a layer: as the model passes it, and as its masks would have it (by `layer_types`).

    Raises:
        ValueError: the two differ.
    """
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or index is None:
        return given
    by_mask = getattr(config, "sliding_window", None) if kinds[index] == "sliding_attention" else None
    if given is not None and given != by_mask:
        raise ValueError(
            f"{type(module).__name__} {index} asks for a window of {given}, its configuration for {by_mask}: its prompts "
            "cannot be shared"
        )
    return by_mask


def register() -> None:
    """Register `attn_implementation=NAME` with transformers. The layout replaces the mask, so none is built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, transformers_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
