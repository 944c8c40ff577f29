"""RMSNorm with a frozen weight. The forward reads each row once, the backward once with its gradient.

    y, inverse_rms = normalise(x, weight, eps, unit_offset=False)
    dx = gradient(grad, x, weight, inverse_rms, unit_offset=False)

The same as `kernels/rms_norm.py` in torch, with fp32 arithmetic between loads and stores. A row's sums are computed by one
program, so results are the same in every run. A program holds complete rows in registers: one, or several narrow ones.

Shapes: R rows, D their width; x may have any number of leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch

ELEMENTS = 4096  # of a program, unless a row is wider
ELEMENTS_OF_A_WARP = 512


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., D] in x's dtype, contiguous, and 1 / rms [..., 1] in fp32; weight [D] has x's dtype."""
    y, inverse_rms = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _launch(forward_kernel, forward_arguments(y, inverse_rms, x, weight, eps, unit_offset=unit_offset))
    return y, inverse_rms


def gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, *, unit_offset: bool
) -> torch.Tensor:
    """dx [..., D] in x's dtype, contiguous, for the arguments of `normalise` and its `inverse_rms`."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(backward_kernel, backward_arguments(dx, grad, x, weight, inverse_rms, unit_offset=unit_offset))
    return dx


def forward_arguments(
    y: torch.Tensor, inverse_rms: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool
) -> dict[str, Any]:
    """The arguments of `forward_kernel`, by name."""
    x_RD = _rows(x)
    tensors = {"y": y, "inverse_rms": inverse_rms, "x": x_RD, "weight": weight.contiguous()}
    return {**tensors, "eps": eps, "UNIT_OFFSET": unit_offset, **_sizes(x_RD, weight)}


def backward_arguments(
    dx: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, *, unit_offset: bool
) -> dict[str, Any]:
    """The arguments of `backward_kernel`, by name."""
    x_RD, grad_RD = _rows(x), _rows(grad)
    tensors = {"dx": dx, "grad": grad_RD, "x": x_RD, "weight": weight.contiguous(), "inverse_rms": inverse_rms}
    return {**tensors, "grad_stride": grad_RD.stride(0), "UNIT_OFFSET": unit_offset, **_sizes(x_RD, weight)}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[R, D] with contiguous rows; a copy only if no view has them."""
    x_RD = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _sizes(x_RD: torch.Tensor, weight_D: torch.Tensor) -> dict[str, Any]:
    rows, width = x_RD.shape
    assert weight_D.shape == (width,) and weight_D.dtype == x_RD.dtype
    block = triton.next_power_of_2(width)
    together = max(1, ELEMENTS // block)
    return {
        "x_stride": x_RD.stride(0),
        "rows": rows,
        "width": width,
        "ROWS": together,
        "BLOCK": block,
        "num_warps": min(16, max(4, together * block // ELEMENTS_OF_A_WARP)),
    }


def _launch(kernel: Any, arguments: dict[str, Any]) -> None:
    launch(kernel, triton.cdiv(arguments["rows"], arguments["ROWS"]), on=arguments["x"], arguments=arguments)


@triton.jit
def forward_kernel(
    y,
    inverse_rms,
    x,
    weight,
    eps,
    x_stride,
    rows,
    width,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    values = tl.load(x + row[:, None] * x_stride + column, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    normed = values * inverse[:, None]
    factor = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    if UNIT_OFFSET:
        normed *= 1.0 + factor
    else:
        normed = normed.to(y.dtype.element_ty).to(tl.float32) * factor  # rounded in between, as in transformers
    tl.store(y + row[:, None] * width + column, normed.to(y.dtype.element_ty), inside)
    tl.store(inverse_rms + row, inverse, row < rows)


@triton.jit
def backward_kernel(
    dx,
    grad,
    x,
    weight,
    inverse_rms,
    grad_stride,
    x_stride,
    rows,
    width,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    values = tl.load(x + row[:, None] * x_stride + column, inside, 0.0).to(tl.float32)
    d_normed = tl.load(grad + row[:, None] * grad_stride + column, inside, 0.0).to(tl.float32)
    factor = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    d_normed *= 1.0 + factor if UNIT_OFFSET else factor
    inverse = tl.load(inverse_rms + row, row < rows, 0.0)[:, None]
    normed = values * inverse
    mean = tl.sum(d_normed * normed, 1)[:, None] / width
    result = (d_normed - normed * mean) * inverse
    tl.store(dx + row[:, None] * width + column, result.to(dx.dtype.element_ty), inside)
