"""PEFT's LoRA layers with rankup's arithmetic: the forward multiplies with the slots and runs the fused kernels.

PEFT injects the layers and owns their names, initialisation, saving and loading (`adapters.py`); here only the forward changes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn

from ..kernels.lora import fused_lora_linear
from ..rollout.slots import AdapterSlot

ADAPTER = "default"  # PEFT's name for the first adapter


class FusedLoRALinear(PeftLoraLinear):
    """PEFT's LoRA linear layer whose forward reads the slot instead of the masters. `slot` is set by `Policy.attach`."""

    slot: AdapterSlot

    @property
    def master_a(self) -> nn.Parameter:
        """A, [r, d_in] in fp32."""
        return cast(nn.Parameter, self.lora_A[ADAPTER].weight)

    @property
    def master_b(self) -> nn.Parameter:
        """B, [d_out, r] in fp32."""
        return cast(nn.Parameter, self.lora_B[ADAPTER].weight)

    @property
    def base_weight(self) -> torch.Tensor:
        """W, [d_out, d_in], frozen."""
        return cast(torch.Tensor, self.get_base_layer().weight)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]; the base layer alone while PEFT's adapters are disabled."""
        base = self.get_base_layer()
        if self.disable_adapters:
            return base(x)
        rank = self.r[ADAPTER]
        return fused_lora_linear(
            x,
            self.base_weight,
            cast("torch.Tensor | None", base.bias),
            self.master_a,
            self.master_b,
            self.slot.a[:rank],
            self.slot.b[:, :rank],
            self.scaling[ADAPTER],
        )
