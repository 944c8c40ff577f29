"""Dequantisation of weights that bitsandbytes packed into 4 bits (NF4, arXiv 2305.14314).

    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    weight = dequantise(packed, state.absmax, state.code, state.shape, torch.bfloat16, blocksize=state.blocksize)

If the scales are quantised too (`state.nested`), dequantise them first with bitsandbytes:
`dequantize_blockwise(state.absmax, state.state2) + state.offset`. A value is `code[4 bits] * scale of its block`, multiplied in
fp32 and rounded once, as in bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import launch

BYTES = 2048
WARPS = 4


def dequantise(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    blocksize: int = 64,
) -> torch.Tensor:
    """The weight, contiguous.

    Args:
        packed: two values a byte, the first in the upper half, uint8 of any shape.
        absmax: scale of each block of `blocksize` values, in fp32.
        code: the values of the 16 codes, in fp32.
        shape, dtype: of the result, dtype one of fp32, bf16 and fp16.
    """
    weight = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    blocks = triton.cdiv(packed.numel(), BYTES)
    launch(dequantise_kernel, blocks, on=packed, arguments=arguments(weight, packed, absmax, code, blocksize=blocksize))
    return weight


def arguments(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, *, blocksize: int
) -> dict[str, Any]:
    """The kernel's arguments, by name."""
    count = weight.numel()
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(count / 2) and weight.is_contiguous()
    assert absmax.dtype == code.dtype == torch.float32 and code.shape == (16,) and blocksize % 2 == 0
    assert absmax.numel() == math.ceil(count / blocksize)
    tensors = {"weight": weight, "packed": packed.contiguous(), "absmax": absmax.contiguous(), "code": code.contiguous()}
    return {**tensors, "count": count, "BLOCKSIZE": blocksize, "BYTES": BYTES, "num_warps": WARPS}


@triton.jit
def dequantise_kernel(weight, packed, absmax, code, count, BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    byte = tl.load(packed + at, 2 * at < count, 0).to(tl.int32)
    scale = tl.load(absmax + at // (BLOCKSIZE // 2), 2 * at < count, 0.0)
    values = tl.interleave(tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale)
    out = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(weight + out, values.to(weight.dtype.element_ty), out < count)
