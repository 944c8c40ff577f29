"""Layers with random adapters, and their computation by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import gelu, linear, silu

from rankup.kernels.lora import Activation, Adapter, Projection

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


def make_layer(
    width: int = 7,
    out: int = 5,
    *,
    rank: int | None = 3,
    bias: bool = True,
    scaling: float = 0.7,
    dtype: torch.dtype = torch.float64,
) -> Projection:
    """Random values; master weights in fp64 for fp64 operands, otherwise in fp32. No adapter for rank None."""
    weight, offset = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype) if bias else None
    if rank is None:
        return Projection(weight, offset, None)
    master_dtype = torch.promote_types(dtype, torch.float32)
    a, b = torch.randn(rank, width).to(dtype), torch.randn(out, rank).to(dtype)
    master_a = a.to(master_dtype, copy=True).requires_grad_()
    master_b = (b.to(master_dtype) / scaling).requires_grad_()
    return Projection(weight, offset, Adapter(master_a, master_b, a, b, scaling))


def dense(layer: Projection) -> torch.Tensor:
    """The weight of a layer that is not in 4 bits."""
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight


def master_weights(layers: Sequence[Projection]) -> list[torch.Tensor]:
    return [m for layer in layers if layer.adapter is not None for m in (layer.adapter.master_a, layer.adapter.master_b)]


def plain(x: torch.Tensor, layer: Projection) -> torch.Tensor:
    """PEFT's computation, from the master weights."""
    y = linear(x, dense(layer), layer.bias)
    if layer.adapter is None:
        return y
    return y + layer.adapter.scaling * linear(linear(x, layer.adapter.master_a), layer.adapter.master_b)


def plain_mlp(x: torch.Tensor, layers: Sequence[Projection], activation: Activation) -> torch.Tensor:
    gate, up, down = layers
    return plain(ACTIVATIONS[activation](plain(x, gate)) * plain(x, up), down)


def gradients(y: torch.Tensor | Sequence[torch.Tensor], grad: object, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, grad)  # type: ignore[arg-type]
