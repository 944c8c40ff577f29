"""Log-probabilities straight from hidden states: no `[tokens, vocabulary]` tensor outlives a chunk.

    logprobs_N, entropy_N = linear_logprobs(hidden_ND, weight_VD, targets_N)                     # no gradient
    loss, logprobs_N, entropy_N = linear_logprob_loss(hidden_ND, weight_VD, targets_N, token_loss)   # gradient for hidden

For a token-level objective the loss of a token depends on its own log-probability alone. So one visit to a chunk of logits
gives the log-probability, the loss, its derivative c = d loss / d logprob, and with it the gradient of the hidden state,
    d hidden = c / temperature * (onehot(target) - softmax) W,
and nothing needs to be kept for the backward but that gradient. The head is frozen: no weight gradient is formed.

Shapes: N tokens, D hidden, V vocabulary. Logits are formed in the hidden's dtype (as the sampler does) and reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Derivative-taking callback: (logprobs_n requiring grad, entropy_n, slice of the N tokens) -> loss of each of the n tokens.
TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]

LOGITS_CHUNK_BYTES = 128 * 2**20


def chunk_rows(vocabulary: int, chunk_bytes: int = LOGITS_CHUNK_BYTES) -> int:
    """How many tokens a chunk holds so that its fp32 logits stay within the budget (at least 16)."""
    return max(16, chunk_bytes // (4 * vocabulary))


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, chunk_bytes: int) -> Iterator[slice]:
    rows = chunk_rows(weight_VD.shape[0], chunk_bytes)
    for start in range(0, hidden_ND.shape[0], rows):
        yield slice(start, min(start + rows, hidden_ND.shape[0]))


def _row_statistics(
    hidden_nD: torch.Tensor, weight_VD: torch.Tensor, targets_n: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax [n, V] (fp32, or fp64 for fp64 inputs), log-probability and entropy of each row [n], at the temperature."""
    logits_nV = hidden_nD @ weight_VD.t()
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    if temperature != 1.0:
        logits_nV /= temperature
    # Shifted by each row's largest: sums and differences then keep their digits however large the logits are.
    logits_nV -= logits_nV.amax(-1, keepdim=True)
    softmax_nV = logits_nV.exp()
    sum_n = softmax_nV.sum(-1)
    softmax_nV /= sum_n[:, None]
    lse_n = sum_n.log()
    logprobs_n = logits_nV.gather(1, targets_n[:, None])[:, 0] - lse_n
    # H = lse - sum p z; a row product avoids another [n, V] tensor.
    entropy_n = lse_n - torch.einsum("nv,nv->n", softmax_nV, logits_nV)
    return softmax_nV, logprobs_n, entropy_n


@torch.no_grad()
def linear_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, both [N] (fp32; fp64 for fp64), without gradient."""
    accumulator = torch.promote_types(hidden_ND.dtype, torch.float32)
    logprobs_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=accumulator)
    entropy_N = torch.empty_like(logprobs_N)
    for s in _chunks(hidden_ND, weight_VD, chunk_bytes):
        _, logprobs_N[s], entropy_N[s] = _row_statistics(hidden_ND[s], weight_VD, targets_N[s], temperature)
    return logprobs_N, entropy_N


class _LinearLogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        token_loss: TokenLoss,
        temperature: float,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_ND = torch.empty_like(hidden_ND)
        accumulator = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss = hidden_ND.new_zeros((), dtype=accumulator)
        logprobs_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=accumulator)
        entropy_N = torch.empty_like(logprobs_N)
        for s in _chunks(hidden_ND, weight_VD, chunk_bytes):
            softmax_nV, logprobs_n, entropy_n = _row_statistics(hidden_ND[s], weight_VD, targets_N[s], temperature)
            with torch.enable_grad():
                leaf_n = logprobs_n.detach().requires_grad_()
                loss_n = token_loss(leaf_n, entropy_n, s)
                (slope_n,) = torch.autograd.grad(loss_n.sum(), leaf_n)
            # In place: c / t * (onehot - softmax), the gradient of the logits.
            grad_logits_nV = softmax_nV.neg_()
            grad_logits_nV[torch.arange(len(targets_N[s]), device=targets_N.device), targets_N[s]] += 1.0
            grad_logits_nV *= (slope_n / temperature)[:, None]
            grad_ND[s] = grad_logits_nV.to(hidden_ND.dtype) @ weight_VD
            loss += loss_n.detach().sum()
            logprobs_N[s], entropy_N[s] = logprobs_n, entropy_n
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(logprobs_N, entropy_N)
        return loss, logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None, None, None, None


def linear_logprob_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of `token_loss` over the tokens, with its gradient for `hidden_ND`, in one visit to the logits.

    Args:
        hidden_ND: hidden states from which each target is predicted.
        weight_VD: the frozen head.
        targets_N: token ids.
        token_loss: pure function of (log-probabilities [n], entropies [n] without gradient, the chunk's slice) that
            returns the loss of each token [n]; differentiated with respect to the log-probabilities.
        temperature: the logits are divided by it first, as the sampler did.
        chunk_bytes: size of the fp32 logits that are formed at a time.

    Returns:
        loss (scalar), log-probabilities [N] and entropies [N], the latter two without gradient.
    """
    return _LinearLogprobLoss.apply(hidden_ND, weight_VD, targets_N, token_loss, temperature, chunk_bytes)  # type: ignore[return-value]
