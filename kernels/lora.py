"""A linear layer and its LoRA adapter as one autograd function.

    y = fused_lora_linear(x, weight, bias, master_a, master_b, a, b, scaling)

The forward multiplies with the operands that the sampler multiplies with (`a`, and `b = scaling * B`, in the sampler's dtype);
the gradients go to the fp32 masters A and B. With u = g b and h = x a^T (facts of the algebra: y = x W^T + h b^T)

    dx = g W + u a        dA = u^T x        dB = scaling * g^T h

Neither `x @ A` in fp32 nor the merged weight is ever formed; h is recomputed (2 T r d_in operations), not kept.

Shapes: T tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _FusedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        master_a_RI: torch.Tensor,
        master_b_OR: torch.Tensor,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
        y_TO.addmm_(x_TI @ a_RI.t(), b_OR.t())
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR)
        ctx.scaling = scaling
        ctx.master_dtypes = (master_a_RI.dtype, master_b_OR.dtype)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_TO,) = grads
        x_TI, weight_OI, a_RI, b_OR = ctx.saved_tensors
        u_TR = grad_TO @ b_OR
        h_TR = x_TI @ a_RI.t()
        grad_x = (grad_TO @ weight_OI).addmm_(u_TR, a_RI) if ctx.needs_input_grad[0] else None
        dtype_a, dtype_b = ctx.master_dtypes
        grad_a = (u_TR.t() @ x_TI).to(dtype_a)
        grad_b = (grad_TO.t() @ h_TR).to(dtype_b).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def fused_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    master_a: torch.Tensor,
    master_b: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`x W^T + bias + (x a^T) b^T`, with gradients for x and for the masters (LoRA, arXiv 2106.09685).

    Args:
        x: [..., I] activations.
        weight: [O, I] frozen base weight; bias: [O] or None, frozen.
        master_a, master_b: [R, I] and [O, R], the fp32 parameters that receive dA and dB. Their values are not read.
        a, b: [R, I] and [O, R] in x's dtype, a = A and b = scaling * B, as published to the sampler.
        scaling: alpha / r (or alpha / sqrt(r)), needed for dB only.

    Returns:
        [..., O] in x's dtype.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = _FusedLoRALinear.apply(x_TI, weight, bias, master_a, master_b, a, b, scaling)
    return y_TO.view(*x.shape[:-1], weight.shape[0])
