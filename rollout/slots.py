"""Adapter slots: views of vLLM's LoRA buffers, one for each PEFT projection.

For every LoRA-wrapped linear layer vLLM holds `lora_a_stacked[i]` [max_loras, 1, R, d_in] and `lora_b_stacked[i]`
[max_loras, 1, d_out_i, R], one i for each packed part. A slot is a pair of views into them. vLLM multiplies with the buffers,
so writing to a slot changes the policy without copying or loading anything.

    slots = find_slots(vllm_model, "path/to/model")
    slots["model.layers.0.self_attn.q_proj"].a      # [R, d_in]

Two layers differ; V is the vocabulary without vLLM's padding:

- the LM head's adapter is in the layer that computes logits, as plain tensors [max_loras, 1, R, d_in] and
  [max_loras, 1, V, R]. Its slot has the head's name, `lm_head`;
- the input embedding's A has a row for each token, [max_loras, V, R], and its B is [max_loras, 1, D, R]. Its slot's `a` is a
  transposed view, [R, V].

R is the engine's `max_lora_rank` (64 or 128). `b` holds the adapter's B times its scaling (`alpha / r`). Rows of `a` and
columns of `b` beyond the adapter's rank are always zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .layer_names import by_transformers_names
from .vllm_compat import require

HEAD = "lm_head"
EMBEDDING = "embed_tokens"


@dataclass(frozen=True, slots=True)
class AdapterSlot:
    """One projection's adapter: `a` [R, d_in] and `b` = scaling * B [d_out, R], in the sampler's dtype."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def max_rank(self) -> int:
        """R, the largest rank that the buffers can hold."""
        return self.a.shape[0]

    @staticmethod
    def empty(*, max_rank: int, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> AdapterSlot:
        """A new slot of zeros, for a policy without an engine."""
        return AdapterSlot(
            a=torch.zeros(max_rank, in_features, dtype=dtype, device=device),
            b=torch.zeros(out_features, max_rank, dtype=dtype, device=device),
        )


def find_slots(vllm_model: nn.Module, model_path: str) -> dict[str, AdapterSlot]:
    """The slots of all projections that vLLM adapts, by PEFT (transformers) module name.

    Raises:
        ValueError: the installed vLLM arranges its buffers differently, splits them over devices, or serves several adapters.
    """
    from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

    purpose = "find vLLM's LoRA buffers"
    packed: dict[str, list[str]] = require(vllm_model, "packed_modules_mapping", purpose=purpose)
    slots: dict[str, AdapterSlot] = {}
    for name, module in vllm_model.named_modules():
        if not isinstance(module, BaseLayerWithLoRA):
            continue
        if getattr(module, "tp_size", 1) != 1:
            raise ValueError("rankup shares the adapter with an engine on one device: tensor parallelism must be 1")
        all_a = require(module, "lora_a_stacked", purpose=purpose)
        all_b = require(module, "lora_b_stacked", purpose=purpose)
        parent, _, layer = name.rpartition(".")
        if isinstance(module, LogitsProcessorWithLoRA):
            layer, all_a, all_b = HEAD, (all_a,), (all_b,)
        elif isinstance(module, VocabParallelEmbeddingWithLoRA):
            all_a, all_b = (all_a.transpose(1, 2)[:, None],), (all_b,)
        parts = packed.get(layer, [layer])
        if not (len(parts) == len(all_a) == len(all_b)) or all_a[0].shape[:2] != (1, 1):
            raise ValueError(
                f"vLLM's layer {name} has {len(all_a)} LoRA buffers of shape {list(all_a[0].shape)}, where one adapter for "
                f"{parts} was expected: this model is not supported"
            )
        for part, a, b in zip(parts, all_a, all_b, strict=True):
            slots[f"{parent}.{part}" if parent else part] = AdapterSlot(a=a[0, 0], b=b[0, 0])
    return by_transformers_names(vllm_model, slots, model_path)
