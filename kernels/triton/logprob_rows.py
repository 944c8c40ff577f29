"""Rows of logits: log-probability and entropy in one read, and their gradient in place of the logits in another.

    arithmetic = TritonRows(factor=1 / temperature, softcap=None)
    rows = arithmetic.measure(logits_nV, targets_n)
    factor_n1 = arithmetic.gradient_in_place(logits_nV, targets_n, rows, slopes)      # logits_nV now holds the gradient

The same as `kernels/logprob_rows.py`, except that `measure` leaves the logits unchanged. Both kernels compute in fp32, and each
number is computed by one program in a fixed order, so results are the same in every run.

Shapes: n rows of logits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..logprob_rows import Rows, Slopes
from . import launch

MEASURE_BLOCK = 4096
GRADIENT_BLOCK = 2048
WARPS = 8

# exp is 0 below about -104. Clamping here keeps logits of -inf and overflowing differences from giving NaN (0 * inf).
NOTHING = tl.constexpr(-1000.0)
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@dataclass(frozen=True, slots=True)
class TritonRows:
    """`TorchRows` as Triton kernels, for logits in fp32, bf16 or fp16; everything else is fp32."""

    factor: float
    softcap: float | None

    def measure(self, logits_nV: torch.Tensor, targets_n: torch.Tensor, *, keep: bool = True) -> Rows:
        """Statistics of the rows. The log-probability of a target (int64) outside the vocabulary is NaN."""
        rows = Rows(*logits_nV.new_empty(4, logits_nV.shape[0], dtype=torch.float32))
        arguments = self.measure_arguments(logits_nV, targets_n, rows)
        launch(measure_kernel, len(logits_nV), on=logits_nV, arguments=arguments)
        return rows

    def gradient_in_place(self, logits_nV: torch.Tensor, targets_n: torch.Tensor, rows: Rows, slopes: Slopes) -> torch.Tensor:
        """Replace the logits by their gradient, up to a factor of each row; returns the factors [n, 1]."""
        assert slopes.any
        arguments = self.gradient_arguments(logits_nV, targets_n, rows, slopes)
        blocks = triton.cdiv(logits_nV.shape[1], arguments["BLOCK"])
        launch(gradient_kernel, len(logits_nV), blocks, on=logits_nV, arguments=arguments)
        if slopes.logprob_n is not None and slopes.entropy_n is None:
            return -self.factor * slopes.logprob_n[:, None]
        return torch.full_like(rows.log_sum_n, -self.factor)[:, None]

    def measure_arguments(self, logits_nV: torch.Tensor, targets_n: torch.Tensor, rows: Rows) -> dict[str, Any]:
        """The arguments of `measure_kernel`, by name."""
        return {"logprobs": rows.logprobs_n, **self._arguments(logits_nV, targets_n, rows, MEASURE_BLOCK)}

    def gradient_arguments(
        self, logits_nV: torch.Tensor, targets_n: torch.Tensor, rows: Rows, slopes: Slopes
    ) -> dict[str, Any]:
        """The arguments of `gradient_kernel`, by name; None for missing slopes."""
        logprob_slopes, entropy_slopes = (None if slope_n is None else slope_n.contiguous() for slope_n in slopes)
        arguments = self._arguments(logits_nV, targets_n, rows, GRADIENT_BLOCK)
        return {**arguments, "logprob_slopes": logprob_slopes, "entropy_slopes": entropy_slopes}

    def _arguments(self, logits_nV: torch.Tensor, targets_n: torch.Tensor, rows: Rows, block: int) -> dict[str, Any]:
        assert logits_nV.stride(1) == 1 and targets_n.shape == logits_nV.shape[:1]
        return {
            "logits": logits_nV,
            "targets": targets_n.contiguous(),
            "entropies": rows.entropy_n,
            "largest_of_rows": rows.largest_n,
            "log_sums": rows.log_sum_n,
            "stride": logits_nV.stride(0),
            "vocabulary": logits_nV.shape[1],
            "factor": self.factor,
            "softcap": self.softcap,
            "BLOCK": min(block, triton.next_power_of_2(logits_nV.shape[1])),
            "num_warps": WARPS,
        }


@triton.jit
def _scaled(y, factor, softcap):
    """z of logits y."""
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(y) / softcap)
        tanh = (1.0 - e) / (1.0 + e)
        y = softcap * tl.where(y < 0.0, -tanh, tanh)
    return y * factor


@triton.jit
def measure_kernel(
    logprobs,
    logits,
    targets,
    entropies,
    largest_of_rows,
    log_sums,
    stride,
    vocabulary,
    factor,
    softcap,
    BLOCK: tl.constexpr,
):
    """One row, a block of logits at a time. When a larger logit appears, the sums so far are rescaled to it."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), LEAST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)  # of exp(z - m), in each lane of the blocks
    weighted = tl.zeros([BLOCK], tl.float32)  # of exp(z - m) (z - m)
    for start in range(0, vocabulary, BLOCK):
        y = tl.load(logits + start + columns, start + columns < vocabulary, 0.0).to(tl.float32)
        z = tl.where(start + columns < vocabulary, _scaled(y, factor, softcap), float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(z, 0))
        step = tl.maximum(before - largest, NOTHING)
        shifted = tl.maximum(z - largest, NOTHING)
        p = tl.exp(shifted)
        scale = tl.exp(step)
        weighted = scale * (weighted + sums * step) + p * shifted
        sums = scale * sums + p
    total = tl.sum(sums, 0)
    log_sum = tl.log(total)
    target = tl.load(targets + row)
    y = tl.load(logits + target, (target >= 0) & (target < vocabulary), float("nan")).to(tl.float32)
    z = _scaled(y, factor, softcap)
    tl.store(logprobs + row, (z - largest) - log_sum)
    tl.store(entropies + row, log_sum - tl.sum(weighted, 0) / total)
    tl.store(largest_of_rows + row, largest)
    tl.store(log_sums + row, log_sum)


@triton.jit
def gradient_kernel(
    logits,
    targets,
    entropies,
    largest_of_rows,
    log_sums,
    logprob_slopes,
    entropy_slopes,
    stride,
    vocabulary,
    factor,
    softcap,
    BLOCK: tl.constexpr,
):
    """c (p - onehot) + e p (log p + H), times the derivative of the cap, for one block of one row; c is 1 without e."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(logits + columns, columns < vocabulary, float("-inf")).to(tl.float32)
    z = _scaled(y, factor, softcap)
    log_p = tl.maximum((z - tl.load(largest_of_rows + row)) - tl.load(log_sums + row), NOTHING)
    p = tl.exp(log_p)
    gradient = tl.zeros([BLOCK], tl.float32)
    if entropy_slopes is not None:
        gradient += tl.load(entropy_slopes + row) * p * (log_p + tl.load(entropies + row))
    if logprob_slopes is not None:
        minus_onehot = p - (columns == tl.load(targets + row)).to(tl.float32)
        gradient += minus_onehot if entropy_slopes is None else tl.load(logprob_slopes + row) * minus_onehot
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(y) / softcap)
        gradient *= 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, with all its digits where tanh is almost 1
    tl.store(logits + columns, gradient.to(logits.dtype.element_ty), columns < vocabulary)
