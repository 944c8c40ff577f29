"""A layer's product and its adapter's in one kernel: `x w + h b`, the rank being further steps of the same sum.

    h = x @ a.t()
    y = product_with_adapter(x, weight.t(), h, b.t(), bias)    # x W^T + h b^T + bias, of a forward
    u = grad @ b
    dx = product_with_adapter(grad, weight, u, a)              # g W + u a, of a backward

A block of the output is summed in fp32 over blocks of W, then over blocks of the rank, and is rounded and written once. Both
loops use the same shared memory, so the rank needs no additional memory: a kernel that holds all of it next to W's blocks needs
more than an A100, H100 or B200 has at r = 128. Sums have a fixed order and no atomics, so results are deterministic.

cuBLAS computes the other products of LoRA (h, u, dA, dB). Their output has r rows or columns, and dA and dB, which sum over
tokens, have too few blocks unless the tokens are split: cuBLAS does that with a workspace, in a fixed order on one stream.

Shapes: T tokens, K and N input and output width of the product (I and O forward, O and I backward), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from . import launch


@dataclass(frozen=True, slots=True)
class Tile:
    """How the product is tiled: blocks of the output [tokens, columns], `depth` of K in a step, `stages` steps in flight."""

    tokens: int
    columns: int
    depth: int
    warps: int
    stages: int


# By compute capability. A stage takes (tokens + columns) * depth * 2 bytes of shared memory, of which a block has 163 KiB on
# A100 (8.0), 227 KiB on H100 and B200 (9.0, 10.0).
TILES = {
    (8, 0): Tile(tokens=128, columns=256, depth=32, warps=8, stages=4),
    (9, 0): Tile(tokens=128, columns=256, depth=64, warps=8, stages=4),
    (10, 0): Tile(tokens=128, columns=256, depth=64, warps=8, stages=4),
}
OTHER_TILE = Tile(tokens=128, columns=128, depth=64, warps=8, stages=3)
"""For all other chips from 8.0 on, of which the smallest have 99 KiB, and for Triton's interpreter."""

RANK_BLOCKS = (64, 32, 16)
TILES_IN_A_GROUP = 8


def product_with_adapter(
    x_TK: torch.Tensor,
    w_KN: torch.Tensor,
    h_TR: torch.Tensor,
    b_RN: torch.Tensor,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x w + h b + bias`, [T, N] in x's dtype, contiguous.

    Operands have one dtype, bf16 or fp16 (fp32 under the interpreter), and any strides. Needs compute capability 8.0.
    """
    out_TN = torch.empty(x_TK.shape[0], w_KN.shape[1], dtype=x_TK.dtype, device=x_TK.device)
    capability = torch.cuda.get_device_capability(x_TK.device) if x_TK.is_cuda else None
    tile = OTHER_TILE if capability is None else TILES.get(capability, OTHER_TILE)
    blocks = triton.cdiv(out_TN.shape[0], tile.tokens) * triton.cdiv(out_TN.shape[1], tile.columns)
    arguments = launch_arguments(x_TK, w_KN, h_TR, b_RN, bias_N, out_TN, tile=tile)
    launch(product_with_adapter_kernel, blocks, on=x_TK, arguments=arguments)
    return out_TN


def launch_arguments(
    x_TK: torch.Tensor,
    w_KN: torch.Tensor,
    h_TR: torch.Tensor,
    b_RN: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_TN: torch.Tensor,
    *,
    tile: Tile,
) -> dict[str, Any]:
    """The arguments of `product_with_adapter_kernel`, by name."""
    (tokens, depth), (rank, columns) = x_TK.shape, b_RN.shape
    assert w_KN.shape == (depth, columns) and h_TR.shape == (tokens, rank) and out_TN.shape == (tokens, columns)
    assert out_TN.is_contiguous() and (bias_N is None or bias_N.is_contiguous())
    assert x_TK.dtype == w_KN.dtype == h_TR.dtype == b_RN.dtype
    return {
        "x_ptr": x_TK,
        "w_ptr": w_KN,
        "h_ptr": h_TR,
        "b_ptr": b_RN,
        "bias_ptr": bias_N,
        "out_ptr": out_TN,
        "T": tokens,
        "N": columns,
        "K": depth,
        "R": rank,
        "x_stride_t": x_TK.stride(0),
        "x_stride_k": x_TK.stride(1),
        "w_stride_k": w_KN.stride(0),
        "w_stride_n": w_KN.stride(1),
        "h_stride_t": h_TR.stride(0),
        "h_stride_r": h_TR.stride(1),
        "b_stride_r": b_RN.stride(0),
        "b_stride_n": b_RN.stride(1),
        "BLOCK_T": tile.tokens,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "BLOCK_R": _rank_block(rank, tile.depth),
        "GROUP": TILES_IN_A_GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _rank_block(rank: int, depth: int) -> int:
    """The largest block that divides the rank (96 takes three steps of 32), otherwise the smallest block that holds it."""
    blocks = [block for block in RANK_BLOCKS if block <= depth]
    return next((block for block in blocks if rank % block == 0), min((b for b in blocks if b >= rank), default=blocks[0]))


# -------------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def product_with_adapter_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    T,
    N,
    K,
    R,
    x_stride_t,
    x_stride_k,
    w_stride_k,
    w_stride_n,
    h_stride_t,
    h_stride_r,
    b_stride_r,
    b_stride_n,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of the output. Programs go down GROUP rows of blocks, then one column on, to share input in the L2."""
    blocks_in_group = GROUP * tl.cdiv(N, BLOCK_N)
    group, within = tl.program_id(0) // blocks_in_group, tl.program_id(0) % blocks_in_group
    rows_of_blocks = min(tl.cdiv(T, BLOCK_T) - group * GROUP, GROUP)
    block_t, block_n = group * GROUP + within % rows_of_blocks, within // rows_of_blocks
    # 64 bits, because tokens times width exceeds 2^31 in long batches of wide layers.
    rows = (block_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    columns = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    is_row, is_column = rows < T, columns < N

    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    x_ptrs, w_ptrs = x_ptr + rows * x_stride_t, w_ptr + columns * w_stride_n
    total = _add_product(total, x_ptrs, w_ptrs, x_stride_k, w_stride_k, is_row, is_column, K, BLOCK_K)
    h_ptrs, b_ptrs = h_ptr + rows * h_stride_t, b_ptr + columns * b_stride_n
    total = _add_product(total, h_ptrs, b_ptrs, h_stride_r, b_stride_r, is_row, is_column, R, BLOCK_R)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows * N + columns
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _add_product(total, left_ptrs, right_ptrs, left_stride, right_stride, is_row, is_column, depth, BLOCK: tl.constexpr):
    """`total + left @ right`, summed over `depth` in steps of BLOCK. Pointers are to the rows [T, 1] and columns [1, N]."""
    steps = tl.arange(0, BLOCK)
    left_ptrs += steps[None, :] * left_stride
    right_ptrs += steps[:, None] * right_stride
    for start in range(0, depth, BLOCK):
        left = tl.load(left_ptrs, mask=is_row & (steps[None, :] < depth - start), other=0.0)
        right = tl.load(right_ptrs, mask=is_column & (steps[:, None] < depth - start), other=0.0)
        total = tl.dot(left, right, total)
        left_ptrs += BLOCK * left_stride
        right_ptrs += BLOCK * right_stride
    return total
