"""What vLLM does slowly on CPU, done faster. `vllm_compat` puts it in its place.

With LoRA vLLM compiles nothing on CPU, so its norms run as eight small torch operations each, though it has a kernel for them;
and every adapted layer goes through a dozen Python calls, with a product for each part of q/k/v although they read the same
input. Its sampler draws a random number for every token of the vocabulary; one for every row is enough.

Legend: T tokens of the step, I = d_in, O = d_out, R the buffers' rank, S = R times the number of parts; N rows of logits,
V vocabulary, B tokens of a block, K blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

BLOCK = 256


def draw_tokens(logprobs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """One token of each row by inverting its distribution function, [N].

    The row's probabilities are summed up to `uniform` of their total: over blocks first, then within the block that is hit.
    A token of probability zero is never drawn.

    Args:
        logprobs_NV: log-probabilities in fp32; minus infinity for tokens that are excluded.
        uniform_N: numbers in [0, 1), fp64.
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
    """The column [N, 1] in which `uniform` of a row's weight is reached, and where within it, from 0 to 1."""
    cumulated_NC = weights_NC.cumsum(-1, dtype=torch.float64)
    total_N1 = cumulated_NC[:, -1:]
    # Rounding must not reach the total: what follows it is not in the row.
    target_N1 = torch.minimum(uniform_N1 * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    column_N1 = torch.searchsorted(cumulated_NC, target_N1, right=True)
    weight_N1 = weights_NC.gather(1, column_N1).double()
    before_N1 = cumulated_NC.gather(1, column_N1) - weight_N1
    return column_N1, ((target_N1 - before_N1) / weight_N1).clamp_(0.0, 1.0)


def sample(
    logits_NV: torch.Tensor, generators: Mapping[int, torch.Generator], k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for the forward of vLLM's `TopKTopPSampler`: tokens [N] and the log-probabilities [N, V] they come from.

    A row whose request has a seed takes one number from the request's generator at each step.

    Raises:
        RuntimeError: a row has logits that are not numbers, or none above minus infinity.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logprobs_NV = apply_top_k_top_p(logits_NV, k, p).log_softmax(-1, dtype=torch.float32)
    if logprobs_NV[:, 0].isnan().any():  # one logit that is no number spoils its whole row
        raise RuntimeError(
            "the policy's logits are not finite, so nothing can be sampled: go back to an earlier adapter and lower "
            "optim.learning_rate"
        )
    uniform_N = torch.rand(logits_NV.shape[0], dtype=torch.float64)
    for row, generator in generators.items():
        uniform_N[row] = torch.rand((), generator=generator, dtype=torch.float64)
    return draw_tokens(logprobs_NV, uniform_N), logprobs_NV


# ------------------------------------------------------------------------------------------ adapted layers


def dense_apply(layer: Any) -> Callable[..., torch.Tensor]:
    """A stand-in for the `apply` of one of vLLM's adapted linear layers, whose wrapper is a `DenseLoRA`.

    The same arithmetic in fewer calls: the parts' A are laid side by side in new buffers (so slots must be looked up
    afterwards), and one product with them serves all parts.
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
        for own_columns, b_RO, own_outputs in zip(columns, all_b_RO, outputs, strict=True):
            y_TO[:, own_outputs].addmm_(h_TS[:, own_columns], b_RO)
        return y_TO

    return apply


# ------------------------------------------------------- norms, with the signatures that vLLM's registry compares


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
    """Whether vLLM's kernel can: a weight for the whole width, one dtype, contiguous."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def fused_add_rms_norm(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + x_residual`, which takes x's place, and that sum, which takes x_residual's."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def takes_fused_add_rms_norm(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """As `takes_rms_norm`, of both tensors."""
    same = x_residual.dtype == x.dtype and x_residual.is_contiguous()
    return same and takes_rms_norm(x, weight, epsilon, variance_size)
