"""Dequantisation of NF4 weights by a kernel: bit-exact with bitsandbytes, and compiled for three chips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import compile_for
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

from rankup.kernels.triton.nf4 import BYTES, arguments, dequantise, dequantise_kernel

interpreted = pytest.mark.interpreted


def quantise(weight: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
    """Packed values and quantisation state from bitsandbytes (which does not type the state's fields)."""
    return quantize_4bit(weight, quant_type="nf4", **options)


@interpreted
@pytest.mark.parametrize("shape", [(1, 64), (3, 123), (7, 11), (2, BYTES), (5, BYTES - 64), (4, 3, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_any_shape_equals_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype, nested: bool) -> None:
    packed, state = quantise(torch.randn(shape).to(dtype), compress_statistics=nested)
    expected = dequantize_4bit(packed, state)
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    weight = dequantise(packed, absmax, state.code, state.shape, dtype, blocksize=state.blocksize)
    assert torch.equal(weight, expected) and weight.dtype == dtype


@interpreted
@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_every_block_size(blocksize: int) -> None:
    packed, state = quantise(torch.randn(30, 100), blocksize=blocksize)
    weight = dequantise(packed, state.absmax, state.code, state.shape, torch.float32, blocksize=blocksize)
    assert torch.equal(weight, dequantize_4bit(packed, state))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_builds_stay_in_registers(capability: int, dtype: torch.dtype) -> None:
    weight, packed = (torch.empty(14_336, 4096 // part, dtype=of, device="meta") for part, of in ((1, dtype), (2, torch.uint8)))
    absmax, code = torch.empty(weight.numel() // 64, device="meta"), torch.empty(16, device="meta")
    build = compile_for(capability, dequantise_kernel, **arguments(weight, packed, absmax, code, blocksize=64))
    assert build.fits and (build.stack, build.local) == (0, 0) and build.registers <= 128
    assert build.count("st.global.v4"), "16 bytes at a time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_equals_bitsandbytes() -> None:
    packed, state = quantise(torch.randn(507, 1024, dtype=torch.bfloat16, device="cuda"))
    weight = dequantise(packed, state.absmax, state.code, state.shape, torch.bfloat16, blocksize=state.blocksize)
    assert torch.equal(weight, dequantize_4bit(packed, state))
