"""Faster replacements for parts of vLLM on CPU. `vllm_compat.py` installs them.

With LoRA vLLM compiles nothing on CPU. Its norms then run as eight small torch operations each although it has kernels for
them, and every adapted layer takes a dozen Python calls, with a product for each part of q/k/v although they read the same
input. Its sampler draws a random number for every token of the vocabulary; one for every row is enough. Its kernel for rotary
embeddings is wrong for some shapes.

Shapes: T tokens of the step, I = d_in, O = d_out, R rank of the buffers, S = R times the number of parts; N rows of logits,
V vocabulary, B tokens of a block, K blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .engine_errors import NOT_FINITE

BLOCK = 256


def draw_tokens(logprobs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """Sample one token of each row by inverse transform sampling, [N].

    Returns the first token at which the cumulative probability exceeds `uniform`. The block of tokens is found first, then the
    token within the block. A token of probability zero is never sampled.

    Args:
        logprobs_NV: log-probabilities in fp32; minus infinity excludes a token.
        uniform_N: random numbers in [0, 1), fp64.
    """
    rows, vocabulary = logprobs_NV.shape
    blocks = -(-vocabulary // BLOCK)
    p_NV = logprobs_NV.new_zeros(rows, blocks * BLOCK) if vocabulary % BLOCK else torch.empty_like(logprobs_NV)
    torch.exp(logprobs_NV, out=p_NV[:, :vocabulary])
    p_NKB = p_NV.view(rows, blocks, BLOCK)
    block_N1, within_N1 = _invert(p_NKB.sum(-1), uniform_N[:, None])
    p_NB = p_NKB.gather(1, block_N1[..., None].expand(rows, 1, BLOCK))[:, 0]
    token_N1, _ = _invert(p_NB, within_N1)
    return (block_N1 * BLOCK + token_N1)[:, 0]


def _invert(weights_NC: torch.Tensor, uniform_N1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first column [N, 1] at which the cumulative weight exceeds `uniform` of the total, and the position in it, 0 to 1."""
    cumulated_NC = weights_NC.cumsum(-1, dtype=torch.float64)
    total_N1 = cumulated_NC[:, -1:]
    # Strictly below the total despite rounding: at the total the search would return a column behind the row.
    target_N1 = torch.minimum(uniform_N1 * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    column_N1 = torch.searchsorted(cumulated_NC, target_N1, right=True)
    weight_N1 = weights_NC.gather(1, column_N1).double()
    before_N1 = cumulated_NC.gather(1, column_N1) - weight_N1
    return column_N1, ((target_N1 - before_N1) / weight_N1).clamp_(0.0, 1.0)


def sample(
    logits_NV: torch.Tensor, generators: Mapping[int, torch.Generator], k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replacement for the forward of vLLM's `TopKTopPSampler`: tokens [N] and the log-probabilities [N, V] they come from.

    A row whose request has a seed takes one number from the request's generator at each step.

    Raises:
        RuntimeError: a row has NaN or plus infinity among its logits, or only minus infinity.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logprobs_NV = apply_top_k_top_p(logits_NV, k, p).log_softmax(-1, dtype=torch.float32)
    if logprobs_NV[:, 0].isnan().any():  # log_softmax makes a row with such a logit all NaN
        raise RuntimeError(NOT_FINITE)
    uniform_N = torch.rand(logits_NV.shape[0], dtype=torch.float64)
    for row, generator in generators.items():
        uniform_N[row] = torch.rand((), generator=generator, dtype=torch.float64)
    return draw_tokens(logprobs_NV, uniform_N), logprobs_NV


# ------------------------------------------------------------------------------------------ adapted layers


def dense_apply(layer: Any) -> Callable[..., torch.Tensor]:
    """Replacement for `apply` of a vLLM linear layer whose LoRA wrapper is a `DenseLoRA`: the same arithmetic in fewer calls.

    Moves the A of all parts into one new buffer, so that one product computes all of them. Find slots afterwards.
    """
    original, wrapper, base = layer.apply, layer.punica_wrapper, layer.base_layer
    base_apply = base.quant_method.apply
    a_SI = torch.cat([a[0, 0] for a in layer.lora_a_stacked])
    layer.lora_a_stacked = tuple(a_RI[None, None] for a_RI in a_SI.chunk(layer.n_slices))
    a_IS, all_b_RO = a_SI.t(), [b[0, 0].t() for b in layer.lora_b_stacked]
    rank = a_SI.shape[0] // layer.n_slices
    columns = [slice(start, start + rank) for start in range(0, a_SI.shape[0], rank)]
    ends = list(itertools.accumulate(layer.output_slices))
    outputs = [slice(end - width, end) for end, width in zip(ends, layer.output_slices, strict=True)]

    def apply(x_TI: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x_TI.dim() != 2:
            return original(x_TI, bias)
        y_TO = base_apply(base, x_TI, bias)
        if wrapper.coverage == "none":
            return y_TO
        h_TS = torch.mm(x_TI, a_IS)
        if wrapper.coverage == "mixed":
            h_TS *= wrapper.row_mask(len(h_TS)).to(h_TS.dtype)
        if len(columns) == 1:
            return y_TO.addmm_(h_TS, all_b_RO[0])
        for columns_of_part, b_RO, outputs_of_part in zip(columns, all_b_RO, outputs, strict=True):
            y_TO[:, outputs_of_part].addmm_(h_TS[:, columns_of_part], b_RO)
        return y_TO

    return apply


# --------------------------------------------------------------------------------------- rotary embedding


def flat_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """`forward_cpu` of vLLM's rotary embedding for queries and keys of any shape that begins with the tokens.

    vLLM's kernel (0.32) takes two dimensions. Of three, [T, heads, D], it rotates heads by the positions of other tokens
    (LFM2), without an error. It computes in place.
    """

    def forward_cpu(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat_query, flat_key = (None if x is None else x.reshape(positions.numel(), -1) for x in (query, key))
        rotated_query, rotated_key = original(self, positions, flat_query, flat_key)
        return rotated_query.view(query.shape), None if key is None else rotated_key.view(key.shape)

    return forward_cpu


# ------------------------------------------------------- norms (vLLM's registry compares signatures, names included)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    """`weight * x / rms(x)` by vLLM's kernel: sums in fp32, rounded once."""
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def takes_rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """Whether vLLM's kernel supports the arguments: a weight of the full width, one dtype, contiguous."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def fused_add_rms_norm(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: x becomes the norm of `x + x_residual`, and x_residual that sum."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def takes_fused_add_rms_norm(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """`takes_rms_norm`, and the same dtype and layout for `x_residual`."""
    same = x_residual.dtype == x.dtype and x_residual.is_contiguous()
    return same and takes_rms_norm(x, weight, epsilon, variance_size)
