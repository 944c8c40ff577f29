"""Builds for chips that are not installed: the instructions and resources of a launch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import SHARED_MEMORY, Build, compile_for


@triton.jit
def product(x_ptr, y_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, BLOCK):
        x = tl.load(x_ptr + rows * n + k + columns)
        y = tl.load(y_ptr + (k + rows) * n + columns * stride)
        total = tl.dot(x, y, total)
    tl.store(out_ptr + rows * BLOCK + columns, total)


@triton.jit
def sum_of_rows(x_ptr, out_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + columns, tl.load(x_ptr + tl.program_id(0) * BLOCK + columns))


def build_product(capability: int, block: int = 128, stride: int = 1, **options: int) -> Build:
    operand = torch.empty(block, block, dtype=torch.bfloat16, device="meta")
    out = torch.empty(block, block, device="meta")
    arguments = {"x_ptr": operand, "y_ptr": operand, "out_ptr": out, "n": 4096, "stride": stride, "BLOCK": block}
    return compile_for(capability, product, **arguments, **{"num_warps": 8, "num_stages": 3, **options})


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_a_product_uses_matrix_instructions_and_shared_memory(capability: int, instruction: str):
    build = build_product(capability)
    assert build.fits and (build.stack, build.local) == (0, 0)
    assert build.count(instruction) and build.count("cp.async")
    assert not build.count("atom") and not build.count("mm")
    two_blocks = 2 * 2 * 128 * 128
    assert 2 * two_blocks <= build.shared <= SHARED_MEMORY[capability]
    assert 0 < build.registers <= 255
    assert (build.tensor_columns > 0) == (capability == 100)


def test_too_many_stages_do_not_fit():
    assert build_product(90, num_stages=3).fits
    assert not build_product(90, num_stages=6).fits


def test_a_stride_of_one_is_a_constant():
    """Asynchronous copies take 16 contiguous bytes."""
    assert build_product(80, block=64, stride=1).count("cp.async") > build_product(80, block=64, stride=3).count("cp.async")


def test_register_spills_are_detected():
    build = build_product(80, block=64, maxnreg=32)
    assert build.registers <= 32
    assert build.stack > 0


def test_atomics_are_detected():
    x, out = torch.empty(9, 64, device="meta"), torch.empty(64, device="meta")
    assert compile_for(90, sum_of_rows, x_ptr=x, out_ptr=out, BLOCK=64, num_warps=1).count("atom")
