"""Log-probabilities straight from hidden states: no `[tokens, vocabulary]` tensor outlives a chunk.

    logprobs_N, entropy_N = linear_logprobs(hidden_ND, head, targets_N)                          # no gradient
    loss, logprobs_N, entropy_N = linear_logprob_loss(hidden_ND, head, targets_N, token_loss)    # gradients

Let z be a row of logits, p = softmax(z), H its entropy, and c and e the derivatives of the loss with respect to that row's
log-probability and entropy. Then

    d loss / dz = c (onehot(target) - p) - e p (log p + H)

so a chunk of logits is one buffer whose content changes in place: logits, then p, then the gradient. Where the loss leaves the
entropy alone, c is a factor of the whole row: the buffer holds p - onehot and the factor is applied to products with it.

The buffer has the hidden's dtype, as the sampler's logits have. What happens to it is done in fp32, by blocks of a few rows,
which stay in a CPU's cache. The head is frozen: no weight gradient is formed. An adapter on it gets the gradients of `lora.py`,

    dh = dy W + u a        dA = u^T h        dB = scaling * dy^T (h a^T)        u = dy b

Shapes: N tokens, n those of a chunk, b those of a block, D hidden, V vocabulary, R rank of the head's adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .lora import Adapter

# (log-probabilities [n], entropies [n], their slice of the N tokens) -> the loss of each of these tokens.
TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
# (log-probabilities [N], entropies [N]) -> a constant factor of each token's loss, [N].
TokenFactor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOGITS_CHUNK_BYTES = 128 * 2**20
# Of a block in fp32. On CPU, where 2 to 8 MiB take the same time, it stays in the cache; elsewhere it bounds memory.
CPU_BLOCK_BYTES = 4 * 2**20
BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The frozen linear head and what the model does to its logits y:

        y = h W^T + (h a^T) b^T        z = scale * softcap * tanh(y / softcap) / temperature

    weight_VD: [V, D] in the hidden's dtype.
    softcap: Gemma's final_logit_softcapping; None for no cap.
    scale: Cohere's logit_scale, 1 / Granite's logits_scaling; after the cap, as in vLLM.
    adapter: LoRA on the head.
    """

    weight_VD: torch.Tensor
    softcap: float | None = None
    scale: float = 1.0
    adapter: Adapter | None = None


def chunk_rows(vocabulary: int, itemsize: int, chunk_bytes: int = LOGITS_CHUNK_BYTES) -> int:
    """How many tokens a chunk holds so that its logits, of `itemsize` bytes each, stay within the budget (at least 16)."""
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
    visits: Literal[1, 2] = 1,
    factor: TokenFactor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of `loss` over the tokens, with its gradients for `hidden_ND` and for the masters of the head's adapter.

    Args:
        hidden_ND: hidden states from which each target is predicted.
        head: the frozen head, with its adapter if it has one.
        targets_N: token ids.
        loss: pure function of (log-probabilities [n], entropies [n], the slice of these tokens), differentiated with respect
            to both; what it returns is summed. It is not called where there are no tokens.
        temperature: the logits are divided by it, as the sampler did.
        chunk_bytes: size of the logits that are formed at a time.
        visits: 1 where a token's loss depends on that token alone: `loss` is called for each chunk, logits are formed once.
            2 where it depends on others, as the ratio of a sequence does: `loss` is called once with all N tokens, and the
            logits are formed again for the gradients (unless one chunk holds them all).
        factor: constant factors of the tokens' losses that are known only once all log-probabilities are, such as whether a
            completion counts at all. With one visit they multiply the gradients that are there by then; an adapter on the
            head has its gradients summed over tokens, and takes two visits.

    Returns:
        loss (scalar), log-probabilities [N] and entropies [N], in fp32 (fp64 for fp64), the latter two without gradient.
    """
    masters = (None, None) if head.adapter is None else (head.adapter.master_a, head.adapter.master_b)
    logits = _Logits(hidden_ND.detach(), head, targets_N, temperature, chunk_bytes)
    if factor is not None and (visits == 2 or head.adapter is not None):
        loss, factor, visits = _weighted(loss, factor), None, 2
    return _LinearLogprobLoss.apply(hidden_ND, *masters, logits, loss, visits, factor)  # type: ignore[return-value]


def _weighted(loss: TokenLoss, factor: TokenFactor) -> TokenLoss:
    """A loss of all N tokens times their factor."""

    def weighted(logprobs_N: torch.Tensor, entropy_N: torch.Tensor, tokens: slice) -> torch.Tensor:
        return loss(logprobs_N, entropy_N, tokens) * factor(logprobs_N.detach(), entropy_N.detach())

    return weighted


class _LinearLogprobLoss(torch.autograd.Function):
    """The gradients are formed in the forward, where the logits are; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        _hidden_ND: torch.Tensor,
        _master_a_RD: torch.Tensor | None,
        _master_b_VR: torch.Tensor | None,
        logits: _Logits,
        loss: TokenLoss,
        visits: Literal[1, 2],
        factor: TokenFactor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients = _Gradients(logits.hidden_ND, logits.head)
        if visits == 2 and len(logits.chunks) > 1:
            logprobs_N, entropy_N = logits.measure()
            loss_N, slopes = _differentiate(loss, logprobs_N, entropy_N, slice(0, len(logprobs_N)))
            for chunk in logits.chunks if slopes.any else ():
                p_nV, rows = logits.probabilities(chunk)
                gradients.add(chunk, p_nV, logits.gradient_in_place(p_nV, chunk, rows, slopes.of(chunk)))
        else:
            logprobs_N, entropy_N = logits.empty_results()
            losses = [logprobs_N[:0]]
            for chunk in logits.chunks:
                p_nV, rows = logits.probabilities(chunk)
                logprobs_N[chunk], entropy_N[chunk] = rows.logprobs_n, rows.entropy_n
                loss_n, slopes = _differentiate(loss, rows.logprobs_n, rows.entropy_n, chunk)
                losses.append(loss_n.flatten())
                if slopes.any:
                    gradients.add(chunk, p_nV, logits.gradient_in_place(p_nV, chunk, rows, slopes))
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
        return *scaled, None, None, None, None


class _Slopes(NamedTuple):
    """Derivatives of the loss with respect to each row's log-probability and entropy, [n]; None where it ignores them."""

    logprob_n: torch.Tensor | None
    entropy_n: torch.Tensor | None

    @property
    def any(self) -> bool:
        return self.logprob_n is not None or self.entropy_n is not None

    def of(self, rows: slice) -> _Slopes:
        return _Slopes(*(None if slope_n is None else slope_n[rows] for slope_n in self))


def _differentiate(
    loss: TokenLoss, logprobs_n: torch.Tensor, entropy_n: torch.Tensor, tokens: slice
) -> tuple[torch.Tensor, _Slopes]:
    """The tokens' losses (with two visits of any shape, they are summed) and their derivatives."""
    with torch.enable_grad():
        leaves = (logprobs_n.detach().requires_grad_(), entropy_n.detach().requires_grad_())
        loss_n = loss(*leaves, tokens)
        slopes = torch.autograd.grad(loss_n.sum(), leaves, allow_unused=True) if loss_n.requires_grad else (None, None)
    return loss_n.detach(), _Slopes(*slopes)


class _Rows(NamedTuple):
    """What is known of rows of logits, [n] each."""

    logprobs_n: torch.Tensor
    entropy_n: torch.Tensor
    lse_n: torch.Tensor

    def of(self, rows: slice) -> _Rows:
        return _Rows(*(value_n[rows] for value_n in self))


class _Logits:
    """Forms the logits a chunk at a time in one buffer, and replaces them there by probabilities, and these by gradients."""

    def __init__(
        self, hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float, chunk_bytes: int
    ) -> None:
        self.hidden_ND, self.head, self.targets_N1 = hidden_ND, head, targets_N[:, None]
        self.factor = head.scale / temperature
        self.dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        tokens, vocabulary = hidden_ND.shape[0], head.weight_VD.shape[0]
        # Chunks of about one size: a product of few rows costs nearly as much as one of many.
        count = max(1, -(-tokens // chunk_rows(vocabulary, hidden_ND.itemsize, chunk_bytes)))
        rows = max(1, -(-tokens // count))
        self.chunks = [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
        self.buffer_nV = hidden_ND.new_empty(rows, vocabulary)
        block_bytes = CPU_BLOCK_BYTES if hidden_ND.device.type == "cpu" else BLOCK_BYTES
        rows = min(rows, max(1, block_bytes // (self.dtype.itemsize * vocabulary)))
        self.block_bV = hidden_ND.new_empty(rows, vocabulary, dtype=self.dtype)
        self.other_block_bV = torch.empty_like(self.block_bV)

    def empty_results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for log-probabilities [N] and entropies [N]."""
        logprobs_N = self.hidden_ND.new_empty(self.hidden_ND.shape[0], dtype=self.dtype)
        return logprobs_N, torch.empty_like(logprobs_N)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [N] and entropies [N], and nothing else."""
        logprobs_N, entropy_N = self.empty_results()
        for chunk in self.chunks:
            _, rows = self.probabilities(chunk, keep=False)
            logprobs_N[chunk], entropy_N[chunk] = rows.logprobs_n, rows.entropy_n
        return logprobs_N, entropy_N

    def probabilities(self, chunk: slice, *, keep: bool = True) -> tuple[torch.Tensor, _Rows]:
        """The buffer [n, V], which holds the chunk's probabilities (if asked to keep them), and its rows."""
        hidden_nD, adapter = self.hidden_ND[chunk], self.head.adapter
        buffer_nV = self.buffer_nV[: hidden_nD.shape[0]]
        torch.mm(hidden_nD, self.head.weight_VD.t(), out=buffer_nV)
        if adapter is not None:
            buffer_nV.addmm_(hidden_nD @ adapter.a.t(), adapter.b.t())
        parts = []
        for block in self._blocks(buffer_nV):
            p_bV, rows = self._softmax(buffer_nV[block], self.targets_N1[chunk][block])
            parts.append(rows)
            if keep:
                buffer_nV[block] = p_bV
        return buffer_nV, _Rows(*map(torch.cat, zip(*parts, strict=True)))

    def gradient_in_place(self, p_nV: torch.Tensor, chunk: slice, rows: _Rows, slopes: _Slopes) -> torch.Tensor:
        """Replace the chunk's probabilities by the gradient of its logits y, except for a factor of each row.

        Returns:
            these factors, [n, 1].
        """
        targets_n1 = self.targets_N1[chunk]
        if slopes.logprob_n is not None and slopes.entropy_n is None and self.head.softcap is None:
            # Not scatter_: on CPU in bf16 that copies the whole chunk to fp32 and back.
            rows_n = torch.arange(len(p_nV), device=p_nV.device)
            p_nV.index_put_((rows_n, targets_n1[:, 0]), rows.logprobs_n.expm1().to(p_nV.dtype))
            return -self.factor * slopes.logprob_n[:, None]
        for block in self._blocks(p_nV):
            p_nV[block] = self._gradient(p_nV[block], targets_n1[block], rows.of(block), slopes.of(block))
        return torch.full_like(rows.lse_n, -self.factor)[:, None]

    def _blocks(self, buffer_nV: torch.Tensor) -> list[slice]:
        rows, most = buffer_nV.shape[0], self.block_bV.shape[0]
        return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]

    def _softmax(self, logits_bV: torch.Tensor, targets_b1: torch.Tensor) -> tuple[torch.Tensor, _Rows]:
        """A block's probabilities [b, V] and its rows."""
        rows = logits_bV.shape[0]
        z_bV, p_bV = self.block_bV[:rows].copy_(logits_bV), self.other_block_bV[:rows]
        if self.head.softcap is not None:
            z_bV.div_(self.head.softcap).tanh_().mul_(self.head.softcap * self.factor)
        elif self.factor != 1.0:
            z_bV.mul_(self.factor)
        # Shifted by each row's largest: sums and differences then keep their digits however large the logits are.
        largest_b1 = z_bV.amax(-1, keepdim=True)
        z_bV.sub_(largest_b1)
        torch.softmax(z_bV, -1, out=p_bV)
        lse_b = -p_bV.amax(-1).log()  # where z is 0, p is 1 / sum(exp z)
        logprobs_b = z_bV.gather(1, targets_b1)[:, 0] - lse_b
        z_bV.clamp_(min=torch.finfo(z_bV.dtype).min)  # a logit of -inf: p z is 0, not NaN
        entropy_b = lse_b - z_bV.mul_(p_bV).sum(-1)
        return p_bV, _Rows(logprobs_b, entropy_b, lse_b + largest_b1[:, 0])

    def _gradient(self, p_bV: torch.Tensor, targets_b1: torch.Tensor, rows: _Rows, slopes: _Slopes) -> torch.Tensor:
        """A block's gradient of the logits y, divided by `-factor`, [b, V].

        The logits are not needed: log p tells them as exactly as logits of p's dtype would.
        """
        p_bV = self.block_bV[: p_bV.shape[0]].copy_(p_bV)
        p_bV.scatter_(1, targets_b1, rows.logprobs_n.exp()[:, None])  # of the target, 1 - p must keep its digits
        log_p_bV = self.other_block_bV[: p_bV.shape[0]]
        torch.clamp(p_bV, min=torch.finfo(p_bV.dtype).tiny, out=log_p_bV).log_()  # p of 0: p log p is 0, not NaN
        logprob_b1 = 0.0 if slopes.logprob_n is None else slopes.logprob_n[:, None]
        if slopes.entropy_n is None:
            p_bV.mul_(logprob_b1)
        else:
            p_bV.mul_((log_p_bV + rows.entropy_n[:, None]).mul_(slopes.entropy_n[:, None]).add_(logprob_b1))
        if slopes.logprob_n is not None:
            p_bV.scatter_add_(1, targets_b1, -slopes.logprob_n[:, None])
        if self.head.softcap is not None:
            log_p_bV.scatter_(1, targets_b1, rows.logprobs_n[:, None])
            capped_bV = log_p_bV.add_(rows.lse_n[:, None]).div_(self.head.softcap * self.factor)
            p_bV.mul_(capped_bV.square_().neg_().add_(1.0))  # the derivative of tanh
        return p_bV


class _Gradients:
    """Of the hidden states [N, D] and of the masters of the head's adapter, these in fp32 (fp64), summed over chunks."""

    def __init__(self, hidden_ND: torch.Tensor, head: Head) -> None:
        self._hidden_ND, self._head = hidden_ND, head
        self.hidden_ND = torch.zeros_like(hidden_ND)
        self.a_RD = None if head.adapter is None else torch.zeros_like(head.adapter.master_a)
        self.b_VR = None if head.adapter is None else torch.zeros_like(head.adapter.master_b)

    def add(self, chunk: slice, gradient_nV: torch.Tensor, factor_n1: torch.Tensor) -> None:
        """Add what comes from a chunk, whose logits y have the gradient `factor * gradient`."""
        hidden_nD, adapter = self._hidden_ND[chunk], self._head.adapter
        self.hidden_ND[chunk] = (gradient_nV @ self._head.weight_VD) * factor_n1
        if adapter is None:
            return
        assert self.a_RD is not None and self.b_VR is not None
        u_nR = ((gradient_nV @ adapter.b) * factor_n1).to(hidden_nD.dtype)
        h_nR = ((hidden_nD @ adapter.a.t()) * (factor_n1 * adapter.scaling)).to(hidden_nD.dtype)
        self.hidden_ND[chunk].addmm_(u_nR, adapter.a)
        self.a_RD += u_nR.t() @ hidden_nD
        self.b_VR += gradient_nV.t() @ h_nR
