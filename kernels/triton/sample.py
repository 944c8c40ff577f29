"""Sampling a token from each row of logits: log-softmax and one draw by inverse transform sampling, in one kernel.

    tokens_N = sample_in_place(logits_NV, seeds_N, positions_N)     # logits_NV now holds the log-probabilities

A row's random number is Philox (Salmon et al. 2011) of its seed and position, and nothing else. Each row is computed by one
program in a fixed order, so its token does not depend on the batch that it is in.

Shapes: N rows, V vocabulary; K blocks of B logits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch

BLOCK = 4096
WARPS = 8
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


def sample_in_place(logits_NV: torch.Tensor, seeds_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """Sample one token of each row, [N] int64, and replace the logits (fp32) by their log-probabilities.

    The first token whose cumulative probability exceeds the row's random number is taken; one of probability zero never is. A
    row with NaN or plus infinity, or with minus infinity alone, becomes NaN, and its token is 0.

    Args:
        seeds_N, positions_N: int64. Rows with equal ones and equal logits get the same token.
    """
    assert logits_NV.dtype == torch.float32
    tokens_N = torch.empty_like(seeds_N)
    arguments = launch_arguments(logits_NV, seeds_N, positions_N, tokens_N)
    launch(sample_kernel, len(logits_NV), on=logits_NV, arguments=arguments)
    return tokens_N


def launch_arguments(
    logits_NV: torch.Tensor, seeds_N: torch.Tensor, positions_N: torch.Tensor, tokens_N: torch.Tensor
) -> dict[str, Any]:
    """The arguments of `sample_kernel`, by name."""
    rows, vocabulary = logits_NV.shape
    assert logits_NV.stride(1) == 1 and seeds_N.shape == positions_N.shape == tokens_N.shape == (rows,)
    assert seeds_N.is_contiguous() and positions_N.is_contiguous() and tokens_N.is_contiguous()
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {
        "logits": logits_NV,
        "seeds": seeds_N,
        "positions": positions_N,
        "tokens": tokens_N,
        "stride": logits_NV.stride(0),
        "vocabulary": vocabulary,
        "BLOCK": block,
        "BLOCKS": triton.next_power_of_2(triton.cdiv(vocabulary, block)),
        "num_warps": WARPS,
    }


@triton.jit
def sample_kernel(
    logits,
    seeds,
    positions,
    tokens,
    stride,
    vocabulary,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row: the sum, the log-probabilities, then the block and the token in it."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), LEAST, tl.float32)  # finite, since minus infinity less itself is NaN
    sums = tl.zeros([BLOCK], tl.float32)  # of exp(z - largest), in each lane of the blocks
    for start in range(0, vocabulary, BLOCK):
        z = tl.load(logits + start + columns, start + columns < vocabulary, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(z, 0))
        sums = sums * tl.exp(before - largest) + tl.exp(z - largest)
    log_sum = tl.log(tl.sum(sums, 0))

    blocks = tl.arange(0, BLOCKS)
    p_of_blocks = tl.zeros([BLOCKS], tl.float64)
    for start in range(0, vocabulary, BLOCK):
        z = tl.load(logits + start + columns, start + columns < vocabulary, float("-inf"))
        logprobs = (z - largest) - log_sum
        tl.store(logits + start + columns, logprobs, start + columns < vocabulary)
        p_of_blocks += tl.where(blocks == start // BLOCK, tl.sum(tl.exp(logprobs), 0).to(tl.float64), 0.0)

    high, low, _, _ = tl.randint4x(tl.load(seeds + row), tl.load(positions + row))
    # 53 bits, in [0, 1).
    uniform = ((high >> 5).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64)) / 9007199254740992.0
    block, within = _invert(p_of_blocks, uniform, blocks)
    first = tl.maximum(block, 0) * BLOCK
    tl.debug_barrier()  # the log-probabilities below were stored by other threads
    logprobs = tl.load(logits + first + columns, first + columns < vocabulary, float("-inf"))
    token, _ = _invert(tl.exp(logprobs).to(tl.float64), within, columns)
    tl.store(tokens + row, (first + tl.maximum(token, 0)).to(tl.int64))


@triton.jit
def _invert(weights, uniform, indices):
    """The first index at which the cumulative weight exceeds `uniform` of the total, and the position in it, 0 to 1. An index
    without weight is never taken; -1 if there is no other."""
    cumulated = tl.cumsum(weights, 0)
    target = uniform * tl.sum(weights, 0)
    first = tl.min(tl.where((cumulated > target) & (weights > 0.0), indices, 2147483647), 0)
    last = tl.max(tl.where(weights > 0.0, indices, -1), 0)
    chosen = tl.minimum(first, last)  # rounding may leave the target at the total
    before = tl.sum(tl.where(indices == chosen, cumulated - weights, 0.0), 0)
    weight = tl.sum(tl.where(indices == chosen, weights, 0.0), 0)
    return chosen, tl.minimum(tl.maximum((target - before) / weight, 0.0), 1.0)
