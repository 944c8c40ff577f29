"""PEFT's LoRA layers with rankup's arithmetic: the forward multiplies with the slots and runs the fused kernels.

PEFT injects the layers and owns their names, initialisation, saving and loading (`adapters.py`); here only the forward changes.
PEFT injects `FusedLoRALinear` and `FusedLoRAEmbedding`. `fusing.py` decides which of the linear layers compute together:
`SharedInput` (q, k and v) and `FusedMLP`.

    layer.slot = slots[name]            # the bf16 adapter that the forward multiplies with
    layer.masters                       # [Master(parameter, role, scaling, rank), ...], A then B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from peft.tuners.lora.layer import Embedding as PeftLoraEmbedding
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from torch import nn

from ...kernels.lora import Activation, Adapter, Projection, lora_embedding, lora_linear, lora_mlp, lora_projections
from ...kernels.nf4 import Nf4Weight
from ...rollout.slots import AdapterSlot

ADAPTER = "default"  # PEFT's name for the first adapter
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


Role = Literal["a", "b", "embedding"]


class Master(NamedTuple):
    """A trained parameter, and the inputs of its learning rate."""

    parameter: nn.Parameter
    role: Role
    """A or B of a linear layer; "embedding" for both of the input embedding's."""
    scaling: float
    """The layer's factor of `B @ A`: alpha / rank, or alpha / sqrt(rank)."""
    rank: int
    """r of the layer."""


class FusedLoRALayer(nn.Module, PeftLoraLayer):
    """Base of both kinds of layers: fp32 master weights, and the slot that the forward reads instead of them.

    `slot` is set by `Policy.attach`.
    """

    slot: AdapterSlot
    roles: tuple[Role, Role] = ("a", "b")

    @property
    def master_a(self) -> nn.Parameter:
        """A, [r, d_in] in fp32."""
        is_embedding = ADAPTER in self.lora_embedding_A
        return cast(nn.Parameter, self.lora_embedding_A[ADAPTER] if is_embedding else self.lora_A[ADAPTER].weight)

    @property
    def master_b(self) -> nn.Parameter:
        """B, [d_out, r] in fp32."""
        is_embedding = ADAPTER in self.lora_embedding_B
        return cast(nn.Parameter, self.lora_embedding_B[ADAPTER] if is_embedding else self.lora_B[ADAPTER].weight)

    @property
    def masters(self) -> list[Master]:
        """A and B."""
        parameters = (self.master_a, self.master_b)
        return [Master(p, role, self.scaling[ADAPTER], self.rank) for p, role in zip(parameters, self.roles, strict=True)]

    @property
    def rank(self) -> int:
        """r of this layer; layers may differ in it (PEFT's `rank_pattern`)."""
        return self.r[ADAPTER]

    @property
    def base_weight(self) -> torch.Tensor:
        """W, frozen: [d_out, d_in] of a linear layer, dequantized on each access if it is in 4 bits; [V, D] of an embedding."""
        base = self.get_base_layer()
        return base.nf4.dense() if isinstance(base, Nf4Linear) else cast(torch.Tensor, base.weight)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it would write into base weights, which may be the sampler's.

        Raises:
            ValueError: always.
        """
        raise ValueError("a policy's base weights are never written: `rankup export RUN --merge` makes a merged model")

    @property
    def adapter(self) -> Adapter:
        """fp32 master weights and slot, in the form that the kernels take."""
        rank = self.rank
        return Adapter(self.master_a, self.master_b, self.slot.a[:rank], self.slot.b[:, :rank], self.scaling[ADAPTER])


class Nf4Linear(nn.Linear):
    """A frozen linear layer in 4 bits. Its `weight` is packed, uint8; `nf4` has the scales and shape that products need."""

    SCALES = "absmax"  # name of the buffer
    absmax: torch.Tensor

    def __init__(self, weight: Nf4Weight, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a dense weight
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.register_buffer(self.SCALES, weight.absmax)
        self.bias = bias

    @property
    def nf4(self) -> Nf4Weight:
        """The weight [d_out, d_in]."""
        return Nf4Weight(self.weight, self.absmax, torch.Size((self.out_features, self.in_features)), self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]."""
        return lora_linear(input, projection(self))


class FusedLoRALinear(FusedLoRALayer, PeftLoraLinear):
    """PEFT's LoRA linear layer whose forward reads the slot instead of the fp32 master weights."""

    shared_input: SharedInput | None = None  # the layers that read the same tensor, this one among them

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]; the base layer alone while PEFT's adapters are disabled."""
        if self.disable_adapters:
            return self.get_base_layer()(x)
        if self.shared_input is not None:
            return self.shared_input.project(self, x)
        return lora_linear(x, projection(self))


class FusedLoRAEmbedding(FusedLoRALayer, PeftLoraEmbedding):
    """PEFT's LoRA embedding whose forward reads the slot instead of the fp32 master weights. d_in is V (vocabulary), d_out D.

    PEFT initialises A with zeros and B from a normal distribution, the reverse of linear layers. The padding token's column of
    A gets no gradient, as in PEFT. A head that is tied to the embedding keeps the bare weight.
    """

    roles = ("embedding", "embedding")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids [...] -> [..., D]; the base layer alone while PEFT's adapters are disabled."""
        base = cast(nn.Embedding, self.get_base_layer())
        embedded = base(x)
        if self.disable_adapters:
            return embedded
        scale = self._get_embed_scale()  # Gemma scales its embeddings by it
        multiplier = 1.0 if scale is None else float(scale)
        return lora_embedding(x, embedded, self.adapter, multiplier=multiplier, padding_idx=base.padding_idx)


def projection(layer: nn.Module) -> Projection:
    """A linear layer in the form that the kernels take, with its adapter if it has one that is not disabled."""
    adapter = None
    if isinstance(layer, FusedLoRALinear):
        adapter = None if layer.disable_adapters else layer.adapter
        layer = layer.get_base_layer()
    assert isinstance(layer, nn.Linear)
    return Projection(layer.nf4 if isinstance(layer, Nf4Linear) else layer.weight, layer.bias, adapter)


class SharedInput:
    """Layers that read the same tensor, computed together when the first of them is called.

    The others' outputs are held until these layers are called with the same tensor object; another tensor is computed again.
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
            self._x = None  # hold no tensor after the pass
        return output

    @property
    def has_unread_outputs(self) -> bool:
        """Whether some computed outputs were never read: then the layers do not read the same tensor."""
        return bool(self._waiting)

    def dissolve(self) -> None:
        """Let every layer compute separately again, and drop the outputs that are held."""
        self._x, self._waiting = None, {}
        for layer in self.layers:
            layer.shared_input = None


class FusedMLP(nn.Module):
    """Replaces a model's MLP: the same children under the same names, one autograd function."""

    def __init__(self, mlp: nn.Module, activation: Activation) -> None:
        super().__init__()
        for name in MLP_LAYERS:
            self.add_module(name, mlp.get_submodule(name))
        self.activation: Activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_model] -> [..., d_model]."""
        return lora_mlp(x, [projection(self.get_submodule(name)) for name in MLP_LAYERS], self.activation)
