"""PEFT's LoRA layers with rankup's arithmetic: the forward multiplies with the slots and runs the fused kernels.

PEFT injects the layers and owns their names, initialisation, saving and loading (`adapters.py`); here only the forward changes.
`fusing.py` decides which of them compute together: `SharedInput` (q, k and v) and `FusedMLP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn

from ..kernels.lora import Activation, Adapter, Projection, lora_linear, lora_mlp, lora_projections
from ..rollout.slots import AdapterSlot

ADAPTER = "default"  # PEFT's name for the first adapter
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


class FusedLoRALinear(PeftLoraLinear):
    """PEFT's LoRA linear layer whose forward reads the slot instead of the masters. `slot` is set by `Policy.attach`."""

    slot: AdapterSlot
    shared_input: SharedInput | None = None  # the layers that read the same tensor, this one among them

    @property
    def master_a(self) -> nn.Parameter:
        """A, [r, d_in] in fp32."""
        return cast(nn.Parameter, self.lora_A[ADAPTER].weight)

    @property
    def master_b(self) -> nn.Parameter:
        """B, [d_out, r] in fp32."""
        return cast(nn.Parameter, self.lora_B[ADAPTER].weight)

    @property
    def rank(self) -> int:
        """r of this layer (it may have its own, PEFT's `rank_pattern`)."""
        return self.r[ADAPTER]

    @property
    def base_weight(self) -> torch.Tensor:
        """W, [d_out, d_in], frozen."""
        return cast(torch.Tensor, self.get_base_layer().weight)

    @property
    def adapter(self) -> Adapter:
        """Masters and operands, as the kernels take them."""
        rank = self.rank
        return Adapter(
            self.master_a, self.master_b, self.slot.a[:rank], self.slot.b[:, :rank], self.scaling[ADAPTER]
        )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]; the base layer alone while PEFT's adapters are disabled."""
        if self.disable_adapters:
            return self.get_base_layer()(x)
        if self.shared_input is not None:
            return self.shared_input.project(self, x)
        return lora_linear(x, projection(self))


def projection(layer: nn.Module) -> Projection:
    """A linear layer as the kernels take it, with its adapter if it has one that is not disabled."""
    if isinstance(layer, FusedLoRALinear):
        base = layer.get_base_layer()
        return Projection(layer.base_weight, base.bias, None if layer.disable_adapters else layer.adapter)  # type: ignore[arg-type]
    assert isinstance(layer, nn.Linear)
    return Projection(layer.weight, layer.bias, None)


class SharedInput:
    """Layers that read the same tensor, computed together when the first of them is called.

    The others' outputs wait until they are called with the very same tensor; another tensor is another computation.
    """

    def __init__(self, layers: Sequence[FusedLoRALinear]) -> None:
        self.layers = tuple(layers)
        self._x: torch.Tensor | None = None
        self._waiting: dict[FusedLoRALinear, torch.Tensor] = {}
        for layer in layers:
            layer.shared_input = self

    def project(self, layer: FusedLoRALinear, x: torch.Tensor) -> torch.Tensor:
        """The output of one of the layers."""
        if x is not self._x or layer not in self._waiting:
            outputs = lora_projections(x, [projection(one) for one in self.layers])
            self._x, self._waiting = x, dict(zip(self.layers, outputs, strict=True))
        output = self._waiting.pop(layer)
        if not self._waiting:
            self._x = None  # nothing of a pass is kept beyond it
        return output

    @property
    def has_unread_outputs(self) -> bool:
        """Whether outputs were computed that nobody asked for: then the layers do not read the same tensor."""
        return bool(self._waiting)

    def dissolve(self) -> None:
        """Let every layer compute by itself again, and forget what waits."""
        self._x, self._waiting = None, {}
        for layer in self.layers:
            layer.shared_input = None


class FusedMLP(nn.Module):
    """Stands in for a model's MLP: the same children under the same names, one autograd function."""

    def __init__(self, mlp: nn.Module, activation: Activation) -> None:
        super().__init__()
        for name in MLP_LAYERS:
            self.add_module(name, mlp.get_submodule(name))
        self.activation: Activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_model] -> [..., d_model]."""
        return lora_mlp(x, [projection(self.get_submodule(name)) for name in MLP_LAYERS], self.activation)
