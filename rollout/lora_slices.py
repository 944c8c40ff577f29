"""One pair of LoRA buffers for each of transformers' projections, where vLLM has several.

vLLM splits the output of some projections: the qkv part of a delta net's input into three slices, that of Mamba into five. It
then has a pair of buffers for each slice, and all A are copies of one. An adapter has one A and one B for the projection, so
the trainer could not multiply with vLLM's buffers. `join_slices` replaces those of a projection by one pair, which computes the
same. `vllm_compat.lora_slices_joined` calls it while an engine is built, before CUDA graphs are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Buffers = tuple[torch.Tensor, ...]


def join_slices(
    layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], widths: Callable[[], Mapping[str, int]]
) -> None:
    """Join the slices of all layers that have more than there are projections.

    Args:
        layers: vLLM's adapted layers by name.
        packed: the names of the projections in each packed layer (`packed_modules_mapping`).
        widths: returns the output width of each projection by vLLM's name; called only if a layer has more slices.
    """
    for name, layer in layers.items():
        slices: tuple[int, ...] | None = getattr(layer, "output_slices", None)  # None: the head, an embedding, experts
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in packed.get(last, [last])]
        if slices is None or len(layer.lora_a_stacked) == len(parts):
            continue
        known = widths()
        wanted = [known[part] for part in parts if part in known]
        if len(wanted) == len(parts) and sum(wanted) == sum(slices):
            _join(layer, wanted)


def _join(layer: Any, widths: Sequence[int]) -> None:
    a, b = layer.lora_a_stacked[0], layer.lora_b_stacked[0]  # [adapters, 1, R, d_in] and [adapters, 1, d_out, R]
    layer.lora_a_stacked = tuple(torch.zeros_like(a) for _ in widths)
    layer.lora_b_stacked = tuple(b.new_zeros(*b.shape[:2], width, b.shape[3]) for width in widths)
    layer.output_slices, layer.n_slices = tuple(widths), len(widths)
    layer.set_lora = _setter(layer)


def _setter(layer: Any) -> Callable[[int, Any, Any], None]:
    """`set_lora` of a joined layer: A and B of each projection, or a list of them, as files have them."""

    def set_lora(index: int, lora_a: torch.Tensor | Sequence[Any], lora_b: torch.Tensor | Sequence[Any]) -> None:
        layer.reset_lora(index)
        all_a, all_b = ([one] if isinstance(one, torch.Tensor) else one for one in (lora_a, lora_b))
        for buffer_a, buffer_b, a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, all_a, all_b, strict=True):
            if a is not None and b is not None:
                buffer_a[index, 0, : a.shape[0]].copy_(a)
                buffer_b[index, 0, :, : b.shape[1]].copy_(b)

    return set_lora
