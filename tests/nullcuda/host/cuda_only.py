"""Operators of torch that have kernels for CUDA only, in plain torch. `on_host.cpp` makes an error of all others."""

from __future__ import annotations

import torch
from dispatch import replace
from torch import Tensor


def install() -> None:
    replace(
        "aten",
        {
            "mm.dtype": mm,
            "bmm.dtype": bmm,
            "addmm.dtype": addmm,
            "baddbmm.dtype": baddbmm,
            "mm.dtype_out": lambda a, b, dtype, *, out: out.copy_(mm(a, b, dtype)),
            "bmm.dtype_out": lambda a, b, dtype, *, out: out.copy_(bmm(a, b, dtype)),
            "addmm.dtype_out": lambda x, a, b, dtype, *, out, **scales: out.copy_(addmm(x, a, b, dtype, **scales)),
            "baddbmm.dtype_out": lambda x, a, b, dtype, *, out, **scales: out.copy_(baddbmm(x, a, b, dtype, **scales)),
            "_fused_rms_norm_backward": rms_norm_backward,
        },
    )


def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A product that is accumulated in fp32, and returned so."""
    return torch.mm(a.float(), b.float()).to(dtype)


def bmm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(a.float(), b.float()).to(dtype)


def addmm(x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.addmm(x.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(dtype)


def baddbmm(x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.baddbmm(x.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], inverse_rms: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the weight."""
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    normed = x.float() * inverse_rms
    d_normed = grad.float() if weight is None else grad.float() * weight.float()
    dx = (d_normed - normed * (d_normed * normed).mean(dims, keepdim=True)) * inverse_rms
    d_weight = (grad.float() * normed).sum(tuple(range(x.dim() - len(shape)))) if weight is not None else None
    return (
        dx.to(x.dtype) if output_mask[0] else None,
        d_weight.to(weight.dtype) if output_mask[1] and weight is not None and d_weight is not None else None,
    )
