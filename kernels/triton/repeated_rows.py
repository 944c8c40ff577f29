"""The sum of each row's copies: read once, added in fp32 in the order of their places, rounded and written once.

    sums_LW = sum_of_copies(values_NW, copies.places_N, copies.starts)          # `RowCopies` of kernels/repeated_rows.py

Each number is computed by one program, without atomics, so results are the same in every run.

Shapes: L rows, N places, W numbers in a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch

BLOCK = 1024
WARPS = 4


def sum_of_copies(values_NW: torch.Tensor, places_N: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[N, ...] to [L, ...] in the same dtype: fp32, bf16 or fp16. Row l has the places `places_N[starts[l]:starts[l + 1]]`."""
    sums_LW = values_NW.new_empty(len(starts) - 1, *values_NW.shape[1:])
    arguments = launch_arguments(values_NW.contiguous(), places_N, starts, sums_LW)
    blocks = triton.cdiv(arguments["width"], BLOCK)
    launch(sum_of_copies_kernel, sums_LW.shape[0], blocks, on=values_NW, arguments=arguments)
    return sums_LW


def launch_arguments(
    values_NW: torch.Tensor, places_N: torch.Tensor, starts: torch.Tensor, sums_LW: torch.Tensor
) -> dict[str, Any]:
    """The arguments of `sum_of_copies_kernel`, by name."""
    assert values_NW.is_contiguous() and sums_LW.is_contiguous() and values_NW.shape[1:] == sums_LW.shape[1:]
    return {
        "values": values_NW,
        "places": places_N,
        "starts": starts,
        "sums": sums_LW,
        "width": values_NW.shape[1:].numel(),
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }


@triton.jit
def sum_of_copies_kernel(values, places, starts, sums, width, BLOCK: tl.constexpr):
    """A block of numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    first, end = tl.load(starts + row), tl.load(starts + row + 1)
    for entry in range(first, end):
        place = tl.load(places + entry)
        total += tl.load(values + place * width + columns, is_column, 0.0).to(tl.float32)
    tl.store(sums + row * width + columns, total.to(sums.dtype.element_ty), is_column)
