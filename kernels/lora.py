"""Linear layers and their LoRA adapters as single autograd functions: one layer, q/k/v together, a whole MLP.

    y = lora_linear(x, projection)                          # one layer
    q, k, v = lora_projections(x, (q_proj, k_proj, v_proj)) # layers that read the same x
    y = lora_mlp(x, (gate, up, down), "silu")               # down(act(gate(x)) * up(x))

The forward multiplies with the operands that the sampler multiplies with (`a`, and `b = scaling * B`, in the sampler's dtype);
the gradients go to the fp32 masters A and B. With h = x a^T, g = dL/dy and u = g b

    y = x W^T + bias + h b^T        dx = g W + u a        dA = u^T x        dB = scaling * g^T h

Neither `x @ A` in fp32 nor the merged weight is ever formed; h is recomputed (2 T r d_in operations), not kept. Layers that
read the same x have their `a` stacked, so x is read once for all their adapters. The MLP keeps x, gate and up, recomputes the
product act(gate) * up, and writes gradients into buffers that it no longer needs.

Each layer may have a bias, a rank of its own, or no adapter at all.

Shapes: T tokens, I = d_in, O = d_out, R rank, S sum of the ranks of layers that read the same x, M width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear, silu

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter (arXiv 2106.09685).

    master_a, master_b: [R, I] and [O, R], the fp32 parameters that receive dA and dB. Their values are not read.
    a, b: [R, I] and [O, R] in the compute dtype, a = A and b = scaling * B, as published to the sampler.
    scaling: alpha / r (or alpha / sqrt(r)), needed for dB only.
    """

    master_a: torch.Tensor
    master_b: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer, weight [O, I] and bias [O] or None, with its adapter or without one."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    adapter: Adapter | None


def lora_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """`x W^T + bias + (x a^T) b^T`: [..., I] to [..., O] in x's dtype, with gradients for x and for the masters."""
    return lora_projections(x, (projection,))[0]


def lora_projections(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """`lora_linear` of several layers that read the same x [..., I]; returns one [..., O_i] for each, in order."""
    x_TI = x.reshape(-1, x.shape[-1])
    outputs = _Projections.apply(x_TI, _scalings(projections), *_tensors(projections))
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in outputs)


def lora_mlp(x: torch.Tensor, gate_up_down: Sequence[Projection], activation: Activation = "silu") -> torch.Tensor:
    """`down(act(gate(x)) * up(x))` (GLU variants, arXiv 2002.05202), [..., I] to [..., O]; gradients as `lora_linear`'s."""
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = _MLP.apply(x_TI, activation, _scalings(gate_up_down), *_tensors(gate_up_down))
    return y_TO.view(*x.shape[:-1], y_TO.shape[1])


# ------------------------------------------------------------------------------------------------- autograd functions


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, scalings: list[float], *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        layers = _layers(tensors, scalings)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TI, *tensors)
        ctx.scalings = scalings
        return tuple(_forward(x_TI, layers))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TI, *tensors = ctx.saved_tensors
        layers = _layers(tensors, ctx.scalings)
        used = [i for i, g in enumerate(grads) if g is not None]
        grads_TO = [g for g in grads if g is not None]
        dx_TI, of_masters = _backward(x_TI, grads_TO, [layers[i] for i in used], needs_dx=ctx.needs_input_grad[0])
        by_layer = dict(zip(used, of_masters, strict=True))
        return dx_TI, None, *_gradients([by_layer.get(i, (None, None)) for i in range(len(layers))])


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, activation: Activation, scalings: list[float], *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        gate, up, down = _layers(tensors, scalings)
        gate_TM, up_TM = _forward(x_TI, (gate, up))
        (y_TO,) = _forward(_activate(gate_TM, activation).mul_(up_TM), (down,))
        ctx.save_for_backward(x_TI, gate_TM, up_TM, *tensors)
        ctx.activation, ctx.scalings = activation, scalings
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_TO,) = grads
        x_TI, gate_TM, up_TM, *tensors = ctx.saved_tensors
        gate, up, down = _layers(tensors, ctx.scalings)
        act_TM = _activate(gate_TM, ctx.activation)
        d_product_TM, of_down = _backward(act_TM * up_TM, [grad_TO], [down], needs_dx=True)
        assert d_product_TM is not None
        # From here on `act` and `d_product` are needed for nothing else, so their memory takes the gradients.
        d_up_TM = act_TM.mul_(d_product_TM)
        d_gate_TM = _activation_backward(d_product_TM.mul_(up_TM), gate_TM, ctx.activation)
        dx_TI, of_inputs = _backward(x_TI, [d_gate_TM, d_up_TM], [gate, up], needs_dx=ctx.needs_input_grad[0])
        return dx_TI, None, None, *_gradients([*of_inputs, *of_down])


# --------------------------------------------------------------------------------------------------- their arithmetic

MasterGradients = tuple[torch.Tensor | None, torch.Tensor | None]


def _forward(x_TI: torch.Tensor, layers: Sequence[Projection]) -> list[torch.Tensor]:
    """The outputs [T, O] of layers that read the same x."""
    h_TR = _reduced(x_TI, layers)
    outputs = []
    for layer, h in zip(layers, h_TR, strict=True):
        y_TO = linear(x_TI, layer.weight, layer.bias)
        if layer.adapter is not None and h is not None:
            y_TO.addmm_(h, layer.adapter.b.t())
        outputs.append(y_TO)
    return outputs


def _backward(
    x_TI: torch.Tensor, grads_TO: Sequence[torch.Tensor], layers: Sequence[Projection], *, needs_dx: bool
) -> tuple[torch.Tensor | None, list[MasterGradients]]:
    """dx [T, I], summed over the layers, and (dA, dB) of each layer."""
    dx_TI = None
    if needs_dx and layers:
        dx_TI = grads_TO[0] @ layers[0].weight
        for grad_TO, layer in zip(grads_TO[1:], layers[1:], strict=True):
            dx_TI.addmm_(grad_TO, layer.weight)
    adapted = [(g, layer.adapter) for g, layer in zip(grads_TO, layers, strict=True) if layer.adapter is not None]
    if not adapted:
        return dx_TI, [(None, None)] * len(layers)
    a_SI = _stacked([adapter.a for _, adapter in adapted])
    u_TS = torch.cat([grad_TO @ adapter.b for grad_TO, adapter in adapted], dim=1)
    if dx_TI is not None:
        dx_TI.addmm_(u_TS, a_SI)
    ranks = [adapter.a.shape[0] for _, adapter in adapted]
    da = (u_TS.t() @ x_TI).to(adapted[0][1].master_a.dtype).split(ranks)
    h_TR = _reduced(x_TI, layers)
    gradients: list[MasterGradients] = []
    remaining = iter(da)
    for grad_TO, layer, h in zip(grads_TO, layers, h_TR, strict=True):
        if layer.adapter is None or h is None:
            gradients.append((None, None))
            continue
        db_OR = (grad_TO.t() @ h).to(layer.adapter.master_b.dtype).mul_(layer.adapter.scaling)
        gradients.append((next(remaining), db_OR))
    return dx_TI, gradients


def _reduced(x_TI: torch.Tensor, layers: Sequence[Projection]) -> list[torch.Tensor | None]:
    """h = x a^T [T, R] of each layer that has an adapter, from one product."""
    stack = [layer.adapter.a for layer in layers if layer.adapter is not None]
    if not stack:
        return [None] * len(layers)
    parts = iter((x_TI @ _stacked(stack).t()).split([a.shape[0] for a in stack], dim=1))
    return [None if layer.adapter is None else next(parts) for layer in layers]


def _stacked(a: Sequence[torch.Tensor]) -> torch.Tensor:
    return a[0] if len(a) == 1 else torch.cat(list(a))


def _activate(gate_TM: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return silu(gate_TM)
    return gelu(gate_TM, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_backward(grad_TM: torch.Tensor, gate_TM: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_TM, gate_TM)
    return torch.ops.aten.gelu_backward(grad_TM, gate_TM, approximate="tanh" if activation == "gelu_tanh" else "none")


# ------------------------------------------------------- autograd sees tensors only: layers as a flat list, and back

TENSORS_PER_LAYER = 6


def _tensors(layers: Sequence[Projection]) -> list[torch.Tensor | None]:
    flat: list[torch.Tensor | None] = []
    for layer in layers:
        flat += [layer.weight, layer.bias]
        adapter = layer.adapter
        flat += [None] * 4 if adapter is None else [adapter.master_a, adapter.master_b, adapter.a, adapter.b]
    return flat


def _scalings(layers: Sequence[Projection]) -> list[float]:
    return [0.0 if layer.adapter is None else layer.adapter.scaling for layer in layers]


def _layers(tensors: Sequence[torch.Tensor | None], scalings: Sequence[float]) -> list[Projection]:
    layers = []
    for i, scaling in enumerate(scalings):
        weight, bias, *adapter = tensors[i * TENSORS_PER_LAYER : (i + 1) * TENSORS_PER_LAYER]
        assert weight is not None
        layers.append(Projection(weight, bias, None if adapter[0] is None else Adapter(*adapter, scaling)))  # type: ignore[arg-type]
    return layers


def _gradients(of_masters: Sequence[MasterGradients]) -> list[torch.Tensor | None]:
    """The layers' gradients in the places of `_tensors`."""
    flat: list[torch.Tensor | None] = []
    for grad_a, grad_b in of_masters:
        flat += [None, None, grad_a, grad_b, None, None]
    return flat
