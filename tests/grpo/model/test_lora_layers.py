"""The embedding's LoRA layer against PEFT's, with tokens that repeat and with the padding token among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.layer import Embedding as PeftLoraEmbedding
from torch import nn

from rankup.grpo.model.lora_layers import ADAPTER, FusedLoRAEmbedding
from rankup.rollout.slots import AdapterSlot

V, D, R = 20, 6, 3
IDS = torch.tensor([[4, 7, 4, 0, 19], [0, 2, 7, 7, 2]])


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: what it gives is multiplied within the layer."""

    embed_scale = torch.tensor(2.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., D]."""
        return super().forward(input) * self.embed_scale


def make_layers(base: nn.Embedding) -> tuple[FusedLoRAEmbedding, PeftLoraEmbedding]:
    """Ours, published, and PEFT's, with the same random masters."""
    config = PeftLoraConfig(r=R, lora_alpha=2)
    ours, theirs = (
        kind(base, ADAPTER, config, r=R, lora_alpha=2) for kind in (FusedLoRAEmbedding, PeftLoraEmbedding)
    )
    assert isinstance(ours, FusedLoRAEmbedding)
    ours.slot = AdapterSlot.empty(max_rank=8, in_features=V, out_features=D, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        nn.init.normal_(ours.master_a)
        theirs.lora_embedding_A[ADAPTER].copy_(ours.master_a)
        theirs.lora_embedding_B[ADAPTER].copy_(ours.master_b)
        ours.slot.a[:R] = ours.master_a
        ours.slot.b[:, :R] = ours.scaling[ADAPTER] * ours.master_b
    return ours, theirs


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_the_embedding_equals_pefts(kind: type[nn.Embedding], padding_idx: int | None) -> None:
    torch.manual_seed(0)
    ours, theirs = make_layers(kind(V, D, padding_idx=padding_idx).requires_grad_(False))
    outputs = [layer(IDS) for layer in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    expected: list[Any] = [theirs.lora_embedding_A[ADAPTER].grad, theirs.lora_embedding_B[ADAPTER].grad]
    torch.testing.assert_close([ours.master_a.grad, ours.master_b.grad], expected, rtol=1e-5, atol=1e-5)
    assert expected[0][:, 0].any() == (padding_idx is None)


def test_a_disabled_embedding_is_the_base_layer() -> None:
    torch.manual_seed(0)
    base = nn.Embedding(V, D).requires_grad_(False)
    ours, _ = make_layers(base)
    assert not torch.allclose(ours(IDS), base(IDS))
    ours.enable_adapters(False)
    assert torch.equal(ours(IDS), base(IDS))
