"""Log-probabilities from hidden states, chunk by chunk: no `[tokens, vocabulary]` tensor is ever formed.

    logprobs_N, entropy_N = linear_logprobs(hidden_ND, head, targets_N)                          # no gradient
    loss, logprobs_N, entropy_N = linear_logprob_loss(hidden_ND, head, targets_N, token_loss)    # gradients

Let z be a row of logits, p = softmax(z), H its entropy, and c and e the derivatives of the loss with respect to that row's
log-probability and entropy. Then

    d loss / dz = c (onehot(target) - p) - e p (log p + H)

so a chunk of logits is one buffer that is overwritten in place: logits, then p, then the gradient. If the loss does not depend
on the entropy, c is a factor of the row: the buffer holds p - onehot, and the factor is applied to products with it.

The buffer has the dtype of the hidden states, like the sampler's logits. Its rows are processed in fp32 by `logprob_rows.py`,
or on a CUDA device by `triton/logprob_rows.py`, which does not store p. The head is frozen: no weight gradient is formed. An
adapter on it gets the gradients of `lora.py`,

    dh = dy W + u a        dA = u^T h        dB = scaling * dy^T (h a^T)        u = dy b

Shapes: N tokens, n those of a chunk, D hidden, V vocabulary, R rank of the head's adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.autograd.function import once_differentiable

from .device import runs_triton
from .logprob_rows import Rows, Slopes, TorchRows
from .lora import Adapter, product

if TYPE_CHECKING:
    from .triton.logprob_rows import TritonRows

# (log-probabilities [n], entropies [n], their slice of the N tokens) -> the loss of each of these tokens.
TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
# (log-probabilities [N], entropies [N]) -> a constant factor of each token's loss, [N].
TokenFactor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOGITS_CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The frozen linear head, and how the model transforms its logits y:

        y = h W^T + (h a^T) b^T        z = scale * softcap * tanh(y / softcap) / temperature

    weight_VD: [V, D] in the hidden's dtype.
    softcap: Gemma's final_logit_softcapping; None for no cap.
    scale: Cohere's logit_scale, 1 / Granite's logits_scaling; applied after the cap, as in vLLM.
    adapter: LoRA on the head.
    """

    weight_VD: torch.Tensor
    softcap: float | None = None
    scale: float = 1.0
    adapter: Adapter | None = None


def chunk_rows(vocabulary: int, itemsize: int, chunk_bytes: int = LOGITS_CHUNK_BYTES) -> int:
    """Tokens in a chunk, such that its logits of `itemsize` bytes each fit in `chunk_bytes`; at least 16."""
    return max(16, chunk_bytes // (itemsize * vocabulary))


@torch.no_grad()
def linear_logprobs(
    hidden_ND: torch.Tensor,
    head: Head,
    targets_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, both [N] (fp32; fp64 for fp64), without gradient."""
    return _Logits(hidden_ND, head, targets_N, temperature, chunk_bytes).measure()


def linear_logprob_loss(
    hidden_ND: torch.Tensor,
    head: Head,
    targets_N: torch.Tensor,
    loss: TokenLoss,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
    passes: Literal[1, 2] = 1,
    factor: TokenFactor | None = None,
    loss_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of `loss` over the tokens, differentiable in `hidden_ND` and in the master weights of the head's adapter.

    Args:
        hidden_ND: hidden states from which each target is predicted.
        head: the frozen head and its adapter, if any.
        targets_N: token ids.
        loss: pure function of (log-probabilities [n], entropies [n], the slice of these tokens), differentiated with respect
            to both; its results are summed. It is not called if there are no tokens.
        temperature: the logits are divided by it, as in the sampler.
        chunk_bytes: size of the logits of a chunk.
        passes: over the logits. 1 if a token's loss depends on that token alone: `loss` is called for each chunk, and logits
            are formed once. 2 if it depends on other tokens (for example through a sequence's ratio): `loss` is called once
            with all N tokens, and the logits are formed again for the gradients, unless they fit in one chunk.
        factor: constant factors of the tokens' losses that depend on all log-probabilities (does a completion count?). In one
            pass they multiply the gradients of the hidden states at the end. The gradients of an adapter on the head are sums
            over tokens, so with such an adapter there are always two passes.
        loss_scale: the gradients are those of `loss_scale * loss`, multiplied before they are rounded to the hidden's dtype.

    Returns:
        loss (scalar), log-probabilities [N] and entropies [N], in fp32 (fp64 for fp64), the latter two without gradient.
    """
    masters = (None, None) if head.adapter is None else (head.adapter.master_a, head.adapter.master_b)
    logits = _Logits(hidden_ND.detach(), head, targets_N, temperature, chunk_bytes)
    if factor is not None and (passes == 2 or head.adapter is not None):
        loss, factor, passes = _weighted(loss, factor), None, 2
    arguments = (*masters, logits, loss, passes, factor, loss_scale)
    return _LinearLogprobLoss.apply(hidden_ND, *arguments)  # type: ignore[return-value]


def _weighted(loss: TokenLoss, factor: TokenFactor) -> TokenLoss:
    """A loss of all N tokens times their factor."""

    def weighted(logprobs_N: torch.Tensor, entropy_N: torch.Tensor, tokens: slice) -> torch.Tensor:
        return loss(logprobs_N, entropy_N, tokens) * factor(logprobs_N.detach(), entropy_N.detach())

    return weighted


class _LinearLogprobLoss(torch.autograd.Function):
    """Forms the gradients in the forward, while it has the logits; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        _hidden_ND: torch.Tensor,
        _master_a_RD: torch.Tensor | None,
        _master_b_VR: torch.Tensor | None,
        logits: _Logits,
        loss: TokenLoss,
        passes: Literal[1, 2],
        factor: TokenFactor | None,
        loss_scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients = _Gradients(logits.hidden_ND, logits.head)
        if passes == 2 and len(logits.chunks) > 1:
            logprobs_N, entropy_N = logits.measure()
            loss_N, slopes = _differentiate(loss, logprobs_N, entropy_N, slice(0, len(logprobs_N)), loss_scale)
            for chunk in logits.chunks if slopes.any else ():
                buffer_nV, rows = logits.form(chunk)
                gradients.add(chunk, buffer_nV, logits.gradient_in_place(buffer_nV, chunk, rows, slopes.of(chunk)))
        else:
            logprobs_N, entropy_N = logits.empty_results()
            losses = [logprobs_N[:0]]
            for chunk in logits.chunks:
                buffer_nV, rows = logits.form(chunk)
                logprobs_N[chunk], entropy_N[chunk] = rows.logprobs_n, rows.entropy_n
                loss_n, slopes = _differentiate(loss, rows.logprobs_n, rows.entropy_n, chunk, loss_scale)
                losses.append(loss_n.flatten())
                if slopes.any:
                    gradients.add(chunk, buffer_nV, logits.gradient_in_place(buffer_nV, chunk, rows, slopes))
            loss_N = torch.cat(losses)
        if factor is not None and len(loss_N):
            factor_N = factor(logprobs_N, entropy_N)
            loss_N = loss_N * factor_N
            gradients.hidden_ND *= factor_N[:, None].to(gradients.hidden_ND.dtype)
        ctx.save_for_backward(gradients.hidden_ND, gradients.a_RD, gradients.b_VR)
        ctx.mark_non_differentiable(logprobs_N, entropy_N)
        return loss_N.sum().to(logprobs_N.dtype), logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if gradient is None else gradient * grads[0] for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def _differentiate(
    loss: TokenLoss, logprobs_n: torch.Tensor, entropy_n: torch.Tensor, tokens: slice, scale: float | None
) -> tuple[torch.Tensor, Slopes]:
    """The tokens' losses (in two passes of any shape, since they are only summed) and `scale` times their derivatives."""
    with torch.enable_grad():
        leaves = (logprobs_n.detach().requires_grad_(), entropy_n.detach().requires_grad_())
        loss_n = loss(*leaves, tokens)
        total = loss_n.sum() if scale is None else scale * loss_n.sum()
        slopes = torch.autograd.grad(total, leaves, allow_unused=True) if loss_n.requires_grad else (None, None)
    return loss_n.detach(), Slopes(*slopes)


class _Logits:
    """Forms the logits a chunk at a time in one buffer, in which their gradient replaces them."""

    def __init__(
        self, hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float, chunk_bytes: int
    ) -> None:
        self.hidden_ND, self.head, self.targets_N = hidden_ND, head, targets_N
        tokens, vocabulary = hidden_ND.shape[0], head.weight_VD.shape[0]
        # Chunks of about the same size: a product of few rows takes nearly as long as one of many.
        count = max(1, -(-tokens // chunk_rows(vocabulary, hidden_ND.itemsize, chunk_bytes)))
        rows = max(1, -(-tokens // count))
        self.chunks = [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
        self.buffer_nV = hidden_ND.new_empty(rows, vocabulary)
        self.arithmetic = _row_arithmetic(self.buffer_nV, head.scale / temperature, head.softcap)

    def empty_results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialized log-probabilities [N] and entropies [N]."""
        dtype = torch.promote_types(self.hidden_ND.dtype, torch.float32)
        logprobs_N = self.hidden_ND.new_empty(self.hidden_ND.shape[0], dtype=dtype)
        return logprobs_N, torch.empty_like(logprobs_N)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [N] and entropies [N], without preparing gradients."""
        logprobs_N, entropy_N = self.empty_results()
        for chunk in self.chunks:
            _, rows = self.form(chunk, keep=False)
            logprobs_N[chunk], entropy_N[chunk] = rows.logprobs_n, rows.entropy_n
        return logprobs_N, entropy_N

    def form(self, chunk: slice, *, keep: bool = True) -> tuple[torch.Tensor, Rows]:
        """The buffer [n, V] from which the chunk's gradient is formed (if `keep`), and the chunk's rows."""
        hidden_nD, adapter = self.hidden_ND[chunk], self.head.adapter
        buffer_nV = self.buffer_nV[: hidden_nD.shape[0]]
        torch.mm(hidden_nD, self.head.weight_VD.t(), out=buffer_nV)
        if adapter is not None:
            buffer_nV.addmm_(hidden_nD @ adapter.a.t(), adapter.b.t())
        return buffer_nV, self.arithmetic.measure(buffer_nV, self.targets_N[chunk], keep=keep)

    def gradient_in_place(self, buffer_nV: torch.Tensor, chunk: slice, rows: Rows, slopes: Slopes) -> torch.Tensor:
        """Replace the buffer by the gradient of the chunk's logits y, up to factors of its rows, returned as [n, 1]."""
        return self.arithmetic.gradient_in_place(buffer_nV, self.targets_N[chunk], rows, slopes)


def _row_arithmetic(buffer_nV: torch.Tensor, factor: float, softcap: float | None) -> TorchRows | TritonRows:
    if runs_triton(buffer_nV):
        from .triton.logprob_rows import TritonRows  # a machine without such a device needs no Triton

        return TritonRows(factor, softcap)
    return TorchRows(buffer_nV, factor, softcap)


class _Gradients:
    """Gradients of the hidden states [N, D] and, summed over chunks, of the head adapter's fp32 (fp64) master weights."""

    def __init__(self, hidden_ND: torch.Tensor, head: Head) -> None:
        self._hidden_ND, self._head = hidden_ND, head
        self.hidden_ND = torch.zeros_like(hidden_ND)
        self.a_RD = None if head.adapter is None else torch.zeros_like(head.adapter.master_a)
        self.b_VR = None if head.adapter is None else torch.zeros_like(head.adapter.master_b)

    def add(self, chunk: slice, gradient_nV: torch.Tensor, factor_n1: torch.Tensor) -> None:
        """Add the contribution of a chunk whose logits y have the gradient `factor * gradient`."""
        hidden_nD, adapter = self._hidden_ND[chunk], self._head.adapter
        self.hidden_ND[chunk] = (gradient_nV @ self._head.weight_VD) * factor_n1
        if adapter is None:
            return
        assert self.a_RD is not None and self.b_VR is not None
        u_nR = ((gradient_nV @ adapter.b) * factor_n1).to(hidden_nD.dtype)
        h_nR = ((hidden_nD @ adapter.a.t()) * (factor_n1 * adapter.scaling)).to(hidden_nD.dtype)
        self.hidden_ND[chunk].addmm_(u_nR, adapter.a)
        self.a_RD += product(u_nR.t(), hidden_nD, dtype=self.a_RD.dtype)
        self.b_VR += product(gradient_nV.t(), h_nR, dtype=self.b_VR.dtype)
