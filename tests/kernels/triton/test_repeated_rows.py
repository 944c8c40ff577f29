"""Sums of repeated rows by a kernel: against the torch path bit for bit, and compiled for several chips."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import SHARED_MEMORY, compile_for

from rankup.kernels import repeated_rows as by_torch
from rankup.kernels.repeated_rows import RowCopies
from rankup.kernels.triton import repeated_rows
from rankup.kernels.triton.repeated_rows import BLOCK, launch_arguments, sum_of_copies_kernel

interpreted = pytest.mark.interpreted


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (BLOCK,), (BLOCK + 1,), (0,)])
@pytest.mark.parametrize("index", [[], [0], [4, 4, 4], [1, 0, 1, 3, 1, 0]])
def test_the_kernel_equals_torch_bit_for_bit(index: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    copies, values = RowCopies(index, 5), torch.randn(len(index), *shape).to(dtype)
    sums = repeated_rows.sum_of_copies(values, copies.places_N, copies.starts)
    assert sums.dtype == dtype and torch.equal(sums, by_torch.sum_of_copies(values, copies))


@interpreted
def test_values_that_are_not_contiguous() -> None:
    copies, values = RowCopies([1, 1, 0], 2), torch.randn(4, 3).t()
    sums = repeated_rows.sum_of_copies(values, copies.places_N, copies.starts)
    assert torch.equal(sums, torch.stack([values[2], values[0] + values[1]]))


@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_every_build_spills_nothing_and_has_no_atomics(capability: int) -> None:
    values, sums = (torch.empty(rows, 8, 128, dtype=torch.bfloat16, device="meta") for rows in (9000, 4000))
    places, starts = (torch.empty(rows, dtype=torch.int64, device="meta") for rows in (9000, 4001))
    found = compile_for(capability, sum_of_copies_kernel, **launch_arguments(values, places, starts, sums))
    assert found.fits and (found.stack, found.local) == (0, 0)
    assert not found.count("atom") and not found.count("red")
