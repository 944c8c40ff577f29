"""Gather rows, some of them many times; the gradient of a row is the sum of its copies' gradients in fp32, in a fixed order.

    copies = RowCopies([0, 1, 1, 1, 2], length=3)
    gathered = copies.gather(rows)                  # rows[[0, 1, 1, 1, 2]]

The backward of torch's `index_select` adds on CUDA with atomics: in bf16, and in an order that differs from run to run. A pack
repeats the last token of a prompt for each completion's first target, and a prompt's keys for each completion.

On a CUDA device one kernel (`triton/repeated_rows.py`) forms all sums. Torch adds copy by copy, for all rows at once.

Shapes: L rows, N gathered rows; W is everything behind the first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .device import runs_triton


class RowCopies:
    """Which of L rows stands at each of N places, and where the copies of each row are.

    Attributes:
        rows_N: the row at each place, int64.
        places_N: the places of row 0, then those of row 1, and so on, each row's in ascending order, int64.
        starts: the first of each row's entries in `places_N`, and the end, [L + 1] int64.
    """

    def __init__(self, rows: Sequence[int], length: int, device: torch.device | str = "cpu") -> None:
        rows_N = torch.tensor(rows, dtype=torch.long)
        self.length = length
        # Kept on the host too: torch's sums take shapes from them.
        self._places_N = rows_N.argsort(stable=True)
        self._counts_L = rows_N.bincount(minlength=length)
        self.rows_N = rows_N.to(device)
        self.places_N = self._places_N.to(device)
        self.starts = torch.nn.functional.pad(self._counts_L.cumsum(0), (1, 0)).to(device)
        if self.rows_N.device.type == "cpu":
            _ = self.rounds  # now, from values: the backward may run on fake tensors (`rankup plan`)

    @cached_property
    def rounds(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """(rows, places) of every row's first copy, of every second copy, and so on.

        Rows with more copies come first, so the rows of a round are the first ones of the round before.
        """
        by_count = self._counts_L.argsort(stable=True, descending=True)
        counts, starts = self._counts_L[by_count], (self._counts_L.cumsum(0) - self._counts_L)[by_count]
        rounds = []
        for copy in range(int(counts[0]) if len(counts) else 0):
            rows = int((counts > copy).sum())
            rounds.append((by_count[:rows].to(self.rows_N.device), self._places_N[starts[:rows] + copy].to(self.rows_N.device)))
        return tuple(rounds)

    def gather(self, rows_LW: torch.Tensor) -> torch.Tensor:
        """`rows[rows_N]`: [L, ...] to [N, ...]. Gradients are summed in fp32 (fp64 for fp64) and rounded once."""
        assert rows_LW.shape[0] == self.length
        return _GatherRows.apply(rows_LW, self)  # type: ignore[return-value]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_LW: torch.Tensor, copies: RowCopies) -> torch.Tensor:
        ctx.copies = copies
        return rows_LW.index_select(0, copies.rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return sum_of_copies(grads[0], ctx.copies), None


def sum_of_copies(values_NW: torch.Tensor, copies: RowCopies) -> torch.Tensor:
    """The sum of the values at each row's places, [L, ...]; zero for a row without copies."""
    if runs_triton(values_NW):
        from .triton import repeated_rows  # a machine without such a device needs no Triton

        return repeated_rows.sum_of_copies(values_NW, copies.places_N, copies.starts)
    sums_LW = values_NW.new_zeros(copies.length, *values_NW.shape[1:]).index_add_(0, copies.rows_N, values_NW)
    if len(copies.rounds) > 1:
        # Exact for a single copy only. Rows with several are summed in a wider buffer, and written over.
        (_, first), (repeated, _), *_ = copies.rounds
        wide = torch.promote_types(values_NW.dtype, torch.float32)
        total = values_NW.index_select(0, first[: len(repeated)]).to(wide)
        for rows, places in copies.rounds[1:]:
            total[: len(rows)] += values_NW.index_select(0, places)
        sums_LW.index_copy_(0, repeated, total.to(values_NW.dtype))
    return sums_LW
