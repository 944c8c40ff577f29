"""SiLU(gate) * up and its gradients, each number read once and written once.

    product = swiglu(gate, up)
    swiglu_backward_in_place(d_product, product, gate, up)      # the first two now hold the gradients of gate and up

Computed in fp32 and rounded once. All tensors have one shape and dtype (fp32, bf16 or fp16).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch

BLOCK = 2048
WARPS = 4


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` (GLU variants, arXiv 2002.05202), contiguous."""
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(forward_kernel, arguments(product=product, gate=gate.contiguous(), up=up.contiguous()))
    return product


def swiglu_backward_in_place(d_product: torch.Tensor, product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Given the gradient of the product, overwrite `d_product` with the gradient of gate, and `product` with that of up.

    Gate and up are unchanged, because a retained graph needs them again. The content of `product` is not read.
    """
    tensors = {"d_product": d_product, "product": product, "gate": gate.contiguous(), "up": up.contiguous()}
    _launch(backward_kernel, arguments(**tensors))


def arguments(**tensors: torch.Tensor) -> dict[str, Any]:
    """A kernel's arguments, by name."""
    gate = tensors["gate"]
    assert all(t.is_contiguous() and t.shape == gate.shape and t.dtype == gate.dtype for t in tensors.values())
    return {**tensors, "count": gate.numel(), "BLOCK": BLOCK, "num_warps": WARPS}


def _launch(kernel: Any, arguments: dict[str, Any]) -> None:
    launch(kernel, triton.cdiv(arguments["count"], BLOCK), on=arguments["gate"], arguments=arguments)


@triton.jit
def forward_kernel(product, gate, up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    u = tl.load(up + at, at < count, 0.0).to(tl.float32)
    tl.store(product + at, (g / (1.0 + tl.exp(-g)) * u).to(product.dtype.element_ty), at < count)


@triton.jit
def backward_kernel(d_product, product, gate, up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    u = tl.load(up + at, at < count, 0.0).to(tl.float32)
    d = tl.load(d_product + at, at < count, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    d_gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(d_product + at, d_gate.to(d_product.dtype.element_ty), at < count)
    tl.store(product + at, (d * g * sigmoid).to(product.dtype.element_ty), at < count)
