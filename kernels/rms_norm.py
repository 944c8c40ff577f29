"""RMSNorm with a frozen weight as one autograd function.

    y = rms_norm(x, weight, eps)                        # weight * round(x / rms)           Llama, Qwen, Mistral
    y = rms_norm(x, weight, eps, unit_offset=True)      # round((1 + weight) * x / rms)     Gemma

The forward does the same operations as transformers, so its output is bit-exact. It saves x and one number a row for the
backward, where autograd would save x in fp32 and a product of its size. On a CUDA device the kernels of `triton/rms_norm.py`
compute the same, but sum in another order, so the last bit may differ. With n = x / rms and d = dL/dn

    dx = (d - n mean(d n)) / rms

Shapes: D the normalised width; x may have any number of leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .device import runs_triton

WIDEST = 16_384
"""Largest D that the kernels support: they hold a row in registers."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False) -> torch.Tensor:
    """Root-mean-square normalisation (arXiv 1910.07467) of x [..., D], weight [D]; statistics in fp32, output in x's dtype."""
    return _RMSNorm.apply(x, weight, eps, unit_offset)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
        ctx.unit_offset = unit_offset
        if _has_kernel(x, weight_D):
            from .triton import rms_norm as kernel  # a machine without such a device needs no Triton

            y, inverse_rms = kernel.normalise(x, weight_D, eps, unit_offset=unit_offset)
            ctx.save_for_backward(x, weight_D, inverse_rms)
            return y
        x32 = _wide(x)
        inverse_rms = x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse_rms)
        normed = x32 * inverse_rms
        if unit_offset:
            return normed.mul_(1.0 + _wide(weight_D)).to(x.dtype)
        return weight_D * normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight_D, inverse_rms = ctx.saved_tensors
        if _has_kernel(x, weight_D):
            from .triton import rms_norm as kernel

            return kernel.gradient(grads[0], x, weight_D, inverse_rms, unit_offset=ctx.unit_offset), None, None, None
        weight_D = 1.0 + _wide(weight_D) if ctx.unit_offset else weight_D
        d_normed = grads[0] * weight_D
        x32, d32 = _wide(x), _wide(d_normed)
        # n mean(d n) / rms = x sum(d x) / (D rms^3), which does not form n.
        factor = torch.linalg.vecdot(d32, x32).unsqueeze(-1).mul_(inverse_rms**3 / -x.shape[-1])
        dx = torch.addcmul(d32 * inverse_rms, x32, factor)
        return dx.to(x.dtype), None, None, None


def _has_kernel(x: torch.Tensor, weight_D: torch.Tensor) -> bool:
    return runs_triton(x, weight_D) and x.dtype == weight_D.dtype and x.shape[-1] <= WIDEST


def _wide(t: torch.Tensor) -> torch.Tensor:
    """At least fp32; fp64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
