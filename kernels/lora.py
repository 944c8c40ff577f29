"""Linear layers and their LoRA adapters as single autograd functions: one layer, q/k/v together, a complete MLP; the embedding.

    y = lora_linear(x, projection)                          # one layer
    q, k, v = lora_projections(x, (q_proj, k_proj, v_proj)) # layers that read the same x
    y = lora_mlp(x, (gate, up, down), "silu")               # down(act(gate(x)) * up(x))
    y = lora_embedding(ids, base(ids), adapter)             # the input embedding, whose A has a column for each token

The forward multiplies with the sampler's operands (`a`, and `b = scaling * B`, in the sampler's dtype); the gradients go to the
fp32 master weights A and B. With h = x a^T, g = dL/dy and u = g b

    y = x W^T + bias + h b^T        dx = g W + u a        dA = u^T x        dB = scaling * g^T h

On CUDA y and dx take one kernel each (`triton/lora.py`) where that is the faster way (`lora_choice.py`); torch computes every
other product, and on other devices all of them. dA and dB are sums over all tokens. cuBLAS writes them in fp32; on CPU torch
has no such product of 16-bit operands, and they are rounded to the operands' dtype first.
A weight in NF4 (`nf4.py`) is dequantised before each product with it and freed afterwards.

Neither `x @ A` in fp32 nor the merged weight is ever formed. h is saved for the backward: it is small compared to x (R of I
columns), and recomputing it would take 2 T R I operations. The `a` of layers that read the same x are stacked, so x is read
once for all their adapters. The MLP also saves x, gate and up, recomputes act(gate) * up, and writes gradients into buffers
that are no longer needed.

Layers may differ in rank, and may have a bias, or no adapter.

Shapes: T tokens, I = d_in, O = d_out, R rank, S sum of the ranks of layers that read the same x, M width of the MLP,
V vocabulary, D width of the embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, gelu, linear, silu

from .device import is_ampere, is_on_cuda, runs_triton
from .lora_choice import choose, kernel_for
from .nf4 import Nf4Weight

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter (arXiv 2106.09685). For an embedding I is V and O is D.

    master_a, master_b: [R, I] and [O, R], the fp32 master weights. They receive the gradients; their values are not read.
    a, b: [R, I] and [O, R] in the compute dtype, a = A and b = scaling * B, as published to the sampler.
    scaling: alpha / r (or alpha / sqrt(r)), used for dB only.
    """

    master_a: torch.Tensor
    master_b: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer: weight [O, I], bias [O] or None, and its adapter or None."""

    weight: torch.Tensor | Nf4Weight
    bias: torch.Tensor | None
    adapter: Adapter | None


def lora_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """`x W^T + bias + (x a^T) b^T`: [..., I] to [..., O] in x's dtype, differentiable in x and the master weights."""
    return lora_projections(x, (projection,))[0]


def lora_projections(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """`lora_linear` for several layers that read the same x [..., I]; returns one [..., O_i] for each, in order."""
    x_TI = x.reshape(-1, x.shape[-1])
    outputs = _Projections.apply(x_TI, projections, *_masters(projections))
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in outputs)


def lora_mlp(x: torch.Tensor, gate_up_down: Sequence[Projection], activation: Activation = "silu") -> torch.Tensor:
    """`down(act(gate(x)) * up(x))` (GLU variants, arXiv 2002.05202), [..., I] to [..., O]; gradients as in `lora_linear`."""
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = _MLP.apply(x_TI, activation, gate_up_down, *_masters(gate_up_down))
    return y_TO.view(*x.shape[:-1], y_TO.shape[1])


def lora_embedding(
    ids: torch.Tensor,
    embedded: torch.Tensor,
    adapter: Adapter,
    *,
    multiplier: float = 1.0,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """`embedded + multiplier * a^T[ids] b^T`: [..., D] in the dtype of `embedded`, differentiable in it and the master weights.

    The gradients of a repeated token are summed in the dtype of the master weights, in a fixed order.

    Args:
        ids: token ids, [...].
        embedded: output of the frozen embedding for these ids, [..., D].
        multiplier: factor that the model's embedding layer applies to its output (Gemma: sqrt(D)).
        padding_idx: a token whose column of A gets no gradient, as in `torch.nn.Embedding`.
    """
    assert embedded.shape[:-1] == ids.shape
    embedded_TD = embedded.reshape(-1, embedded.shape[-1])
    padding = -1 if padding_idx is None else padding_idx
    masters = adapter.master_a, adapter.master_b
    return _Embedding.apply(embedded_TD, ids.reshape(-1), adapter, multiplier, padding, *masters).view(embedded.shape)


# ------------------------------------------------------------------------------------------------- autograd functions

# The master weights are arguments because they receive gradients; the frozen rest of a layer stays in its `Projection`. The
# operands are saved too: publishing others between forward and backward is then an error of torch.


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, layers: Sequence[Projection], *_masters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        outputs, h_TS = _forward(x_TI, layers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TI, h_TS, *_operands(layers))
        ctx.layers = layers
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TI, h_TS, *_ = ctx.saved_tensors
        dx_TI, of_masters = _backward(x_TI, h_TS, grads, ctx.layers, needs_dx=ctx.needs_input_grad[0])
        return dx_TI, None, *itertools.chain(*of_masters)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, activation: Activation, layers: Sequence[Projection], *_masters: torch.Tensor | None
    ) -> torch.Tensor:
        gate, up, down = layers
        (gate_TM, up_TM), h_TS = _forward(x_TI, (gate, up))
        (y_TO,), h_of_down_TR = _forward(_gated(gate_TM, up_TM, activation), (down,))
        ctx.save_for_backward(x_TI, gate_TM, up_TM, h_TS, h_of_down_TR, *_operands(layers))
        ctx.activation, ctx.layers = activation, layers
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_TO,) = grads
        x_TI, gate_TM, up_TM, h_TS, h_of_down_TR, *_ = ctx.saved_tensors
        gate, up, down = ctx.layers
        if _has_swiglu(gate_TM, up_TM, ctx.activation):
            from .triton.swiglu import swiglu_backward_in_place

            product_TM = _gated(gate_TM, up_TM, ctx.activation)
            d_product_TM, of_down = _backward(product_TM, h_of_down_TR, [grad_TO], [down], needs_dx=True)
            assert d_product_TM is not None
            swiglu_backward_in_place(d_product_TM, product_TM, gate_TM, up_TM)
            d_gate_TM, d_up_TM = d_product_TM, product_TM
        else:
            act_TM = _activate(gate_TM, ctx.activation)
            d_product_TM, of_down = _backward(act_TM * up_TM, h_of_down_TR, [grad_TO], [down], needs_dx=True)
            assert d_product_TM is not None
            # `act` and `d_product` are not needed any more, so the gradients overwrite them.
            d_up_TM = act_TM.mul_(d_product_TM)
            d_gate_TM = _activation_backward(d_product_TM.mul_(up_TM), gate_TM, ctx.activation)
        dx_TI, of_inputs = _backward(x_TI, h_TS, [d_gate_TM, d_up_TM], [gate, up], needs_dx=ctx.needs_input_grad[0])
        return dx_TI, None, None, *itertools.chain(*of_inputs, *of_down)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embedded_TD: torch.Tensor,
        ids_T: torch.Tensor,
        adapter: Adapter,
        multiplier: float,
        padding: int,
        *_masters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(ids_T, adapter.a, adapter.b)
        ctx.adapter, ctx.multiplier, ctx.padding = adapter, multiplier, padding
        return torch.addmm(embedded_TD, embedding(ids_T, adapter.a.t()), adapter.b.t(), alpha=multiplier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_TD,), adapter = grads, ctx.adapter
        ids_T, a_RV, b_DR = ctx.saved_tensors
        u_TR = product(grad_TD, b_DR, dtype=adapter.master_a.dtype).mul_(ctx.multiplier)
        da_VR = torch.ops.aten.embedding_dense_backward(u_TR, ids_T, a_RV.shape[1], ctx.padding, False)
        db_RD = product(embedding(ids_T, a_RV.t()).t(), grad_TD, dtype=adapter.master_b.dtype)
        db_DR = torch.empty_like(adapter.master_b).copy_(db_RD.t()).mul_(adapter.scaling * ctx.multiplier)
        return grad_TD if ctx.needs_input_grad[0] else None, None, None, None, None, da_VR.t(), db_DR


def _masters(layers: Sequence[Projection]) -> list[torch.Tensor | None]:
    """A and B of each layer, None for a layer without an adapter."""
    adapters = [layer.adapter for layer in layers]
    return [t for one in adapters for t in ((None, None) if one is None else (one.master_a, one.master_b))]


def _operands(layers: Sequence[Projection]) -> list[torch.Tensor]:
    return [t for layer in layers if layer.adapter is not None for t in (layer.adapter.a, layer.adapter.b)]


# --------------------------------------------------------------------------------------------------- their arithmetic

MasterGradients = tuple[torch.Tensor | None, torch.Tensor | None]


def _forward(x_TI: torch.Tensor, layers: Sequence[Projection]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The outputs [T, O] of layers that read the same x, and the h of those with an adapter, concatenated to [T, S]."""
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    h_TS = x_TI @ _stacked(adapters).t() if adapters else None
    outputs = []
    for layer, columns in zip(layers, _columns(layers), strict=True):
        if layer.adapter is None or h_TS is None:
            outputs.append(linear(x_TI, _dense(layer.weight), layer.bias))
        else:
            h_TR, b_RO = h_TS[:, columns], layer.adapter.b.t()
            outputs.append(_product_with_adapter(x_TI, _dense(layer.weight).t(), h_TR, b_RO, layer.bias))
    return outputs, h_TS


def _backward(
    x_TI: torch.Tensor,
    h_TS: torch.Tensor | None,
    grads_TO: Sequence[torch.Tensor | None],
    layers: Sequence[Projection],
    *,
    needs_dx: bool,
) -> tuple[torch.Tensor | None, list[MasterGradients]]:
    """dx [T, I], summed over the layers, and (dA, dB) of each layer; None if a layer's output has no gradient."""
    gradients: list[MasterGradients] = [(None, None)] * len(layers)
    columns = _columns(layers)
    used = [(i, grad_TO, layers[i]) for i, grad_TO in enumerate(grads_TO) if grad_TO is not None]
    bare = [(grad_TO, layer.weight) for _, grad_TO, layer in used]
    adapted = [(i, grad_TO, layer.adapter) for i, grad_TO, layer in used if layer.adapter is not None]
    if not adapted or h_TS is None:
        return _sum_of_products(None, bare) if needs_dx else None, gradients
    adapters = [adapter for _, _, adapter in adapted]
    u_TS = _side_by_side([grad_TO @ adapter.b for _, grad_TO, adapter in adapted])
    dx_TI: torch.Tensor | None = None
    if needs_dx:
        # All adapters are added together with the first layer's product, so dx is written once for both.
        grad_TO, weight_OI = bare[0]
        dx_TI = _product_with_adapter(grad_TO, _dense(weight_OI), u_TS, _stacked(adapters))
        dx_TI = _sum_of_products(dx_TI, bare[1:])
    da_SI = product(u_TS.t(), x_TI, dtype=adapters[0].master_a.dtype)
    da = da_SI.split([adapter.a.shape[0] for adapter in adapters])
    for (i, grad_TO, adapter), da_RI in zip(adapted, da, strict=True):
        # Transposed because a product with the larger matrix on the right takes three quarters of the time on CPU.
        db_RO = product(h_TS[:, columns[i]].t(), grad_TO, dtype=adapter.master_b.dtype)
        db_OR = torch.empty_like(adapter.master_b).copy_(db_RO.t()).mul_(adapter.scaling)
        gradients[i] = (da_RI, db_OR)
    return dx_TI, gradients


def _product_with_adapter(
    x_TK: torch.Tensor, w_KN: torch.Tensor, h_TR: torch.Tensor, b_RN: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """`x w + h b + bias`, [T, N]: y of a forward, dx of a backward."""
    if _has_kernel(x_TK) and kernel_for(w_KN, b_RN) == "triton":
        from .triton import lora  # a machine without such a device needs no Triton

        return lora.product_with_adapter(x_TK, w_KN, h_TR, b_RN, bias_N)
    return _two_products(x_TK, w_KN, h_TR, b_RN, bias_N)


def _two_products(
    x_TK: torch.Tensor, w_KN: torch.Tensor, h_TR: torch.Tensor, b_RN: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    return linear(x_TK, w_KN.t(), bias_N).addmm_(h_TR, b_RN)


def choose_kernel(
    kernel: Literal["auto", "triton", "cublas"], run: Callable[[], object], *, like: torch.Tensor
) -> str | None:
    """`lora_choice.choose` between the kernel and torch's products, for layers with weights such as `like`. None without a
    device that has the kernel."""
    if not _has_kernel(like):
        return None
    from .triton import lora

    return choose(kernel, run, {"triton": lora.product_with_adapter, "cublas": _two_products})


def product(left_MK: torch.Tensor, right_KN: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """`left right`, [M, N] in `dtype`: the operands', or fp32 for 16-bit operands, which on CUDA is not rounded to 16 bits."""
    if left_MK.dtype != dtype and is_on_cuda(left_MK):
        return torch.mm(left_MK, right_KN, out_dtype=dtype)
    return (left_MK @ right_KN).to(dtype)


def _has_kernel(x: torch.Tensor) -> bool:
    """Whether `kernels/triton/lora.py` supports x. Its tiles are for 16-bit operands."""
    return is_ampere(x)


def _sum_of_products(
    total: torch.Tensor | None, factors: Sequence[tuple[torch.Tensor, torch.Tensor | Nf4Weight]]
) -> torch.Tensor | None:
    """`total` plus the product of each pair, in place; None if there is neither."""
    for left, right in factors:
        total = left @ _dense(right) if total is None else total.addmm_(left, _dense(right))
    return total


def _dense(weight: torch.Tensor | Nf4Weight) -> torch.Tensor:
    return weight.dense() if isinstance(weight, Nf4Weight) else weight


def _columns(layers: Sequence[Projection]) -> list[slice]:
    """Each layer's columns of h [T, S]; empty for a layer without an adapter."""
    ends = list(itertools.accumulate(0 if layer.adapter is None else layer.adapter.a.shape[0] for layer in layers))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _stacked(adapters: Sequence[Adapter]) -> torch.Tensor:
    """Their `a`, concatenated to [S, I]."""
    return adapters[0].a if len(adapters) == 1 else torch.cat([adapter.a for adapter in adapters])


def _side_by_side(parts_TR: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts_TR[0] if len(parts_TR) == 1 else torch.cat(list(parts_TR), dim=1)


def _has_swiglu(gate_TM: torch.Tensor, up_TM: torch.Tensor, activation: Activation) -> bool:
    """Whether `kernels/triton/swiglu.py` supports these tensors and this activation."""
    return activation == "silu" and runs_triton(gate_TM, up_TM)


def _gated(gate_TM: torch.Tensor, up_TM: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up."""
    if _has_swiglu(gate_TM, up_TM, activation):
        from .triton.swiglu import swiglu

        return swiglu(gate_TM, up_TM)
    return _activate(gate_TM, activation).mul_(up_TM)


def _activate(gate_TM: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return silu(gate_TM)
    return gelu(gate_TM, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_backward(grad_TM: torch.Tensor, gate_TM: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_TM, gate_TM)
    return torch.ops.aten.gelu_backward(grad_TM, gate_TM, approximate="tanh" if activation == "gelu_tanh" else "none")
