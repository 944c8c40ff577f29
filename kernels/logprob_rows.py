"""Rows of logits in plain torch: log-probabilities and entropies, then the loss's gradient in place of the logits.

    arithmetic = TorchRows(buffer_nV, factor=1 / temperature, softcap=None)
    rows = arithmetic.measure(logits_nV, targets_n)                                   # logits_nV now holds probabilities
    factor_n1 = arithmetic.gradient_in_place(logits_nV, targets_n, rows, slopes)      # and now the gradient

The gradient's formula is in `kernels/logprob.py`; `kernels/triton/logprob_rows.py` computes the same on a CUDA device. All
arithmetic is fp32 (fp64 for fp64), in blocks of a few rows that fit in a CPU's cache.

Shapes: n rows of logits, b those of a block, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Size of a block in fp32. On CPU it fits in the cache (2 to 8 MiB are equally fast); elsewhere it bounds memory.
CPU_BLOCK_BYTES = 4 * 2**20
BLOCK_BYTES = 256 * 2**20


class Slopes(NamedTuple):
    """Derivatives of the loss with respect to each row's log-probability and entropy, [n]; None if it does not depend on it."""

    logprob_n: torch.Tensor | None
    entropy_n: torch.Tensor | None

    @property
    def any(self) -> bool:
        return self.logprob_n is not None or self.entropy_n is not None

    def of(self, rows: slice) -> Slopes:
        return Slopes(*(None if slope_n is None else slope_n[rows] for slope_n in self))


class Rows(NamedTuple):
    """Statistics of rows of logits z, [n] each: log p of the target, entropy, the largest z and log sum exp(z - largest).

    The last two are separate because their sum (log p = z - sum) loses digits if logits are large.
    """

    logprobs_n: torch.Tensor
    entropy_n: torch.Tensor
    largest_n: torch.Tensor
    log_sum_n: torch.Tensor

    def of(self, rows: slice) -> Rows:
        return Rows(*(value_n[rows] for value_n in self))


class TorchRows:
    """Measures rows of z = factor * softcap * tanh(y / softcap) of logits y, and forms the gradient of y.

    Args:
        buffer_nV: a tensor with the shape and dtype of the logits.
        factor: multiplies the logits, after the cap.
        softcap: None for no cap.
    """

    def __init__(self, buffer_nV: torch.Tensor, factor: float, softcap: float | None) -> None:
        self.factor, self.softcap = factor, softcap
        dtype = torch.promote_types(buffer_nV.dtype, torch.float32)
        rows, vocabulary = buffer_nV.shape
        block_bytes = CPU_BLOCK_BYTES if buffer_nV.device.type == "cpu" else BLOCK_BYTES
        rows = min(rows, max(1, block_bytes // (dtype.itemsize * vocabulary)))
        self.block_bV = buffer_nV.new_empty(rows, vocabulary, dtype=dtype)
        self.other_block_bV = torch.empty_like(self.block_bV)

    def measure(self, logits_nV: torch.Tensor, targets_n: torch.Tensor, *, keep: bool = True) -> Rows:
        """The rows' statistics. If `keep`, probabilities replace the logits."""
        parts = []
        for block in self._blocks(logits_nV):
            p_bV, rows = self._softmax(logits_nV[block], targets_n[block, None])
            parts.append(rows)
            if keep:
                logits_nV[block] = p_bV
        return Rows(*map(torch.cat, zip(*parts, strict=True)))

    def gradient_in_place(self, p_nV: torch.Tensor, targets_n: torch.Tensor, rows: Rows, slopes: Slopes) -> torch.Tensor:
        """Replace the probabilities by the gradient of the logits y, up to a factor of each row; returns the factors [n, 1]."""
        if slopes.logprob_n is not None and slopes.entropy_n is None and self.softcap is None:
            # Not scatter_, which on CPU in bf16 copies the complete chunk to fp32 and back.
            rows_n = torch.arange(len(p_nV), device=p_nV.device)
            p_nV.index_put_((rows_n, targets_n), rows.logprobs_n.expm1().to(p_nV.dtype))
            return -self.factor * slopes.logprob_n[:, None]
        for block in self._blocks(p_nV):
            p_nV[block] = self._gradient(p_nV[block], targets_n[block, None], rows.of(block), slopes.of(block))
        return torch.full_like(rows.log_sum_n, -self.factor)[:, None]

    def _blocks(self, buffer_nV: torch.Tensor) -> list[slice]:
        rows, most = buffer_nV.shape[0], self.block_bV.shape[0]
        return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]

    def _softmax(self, logits_bV: torch.Tensor, targets_b1: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """A block's probabilities [b, V] and its statistics."""
        rows = logits_bV.shape[0]
        z_bV, p_bV = self.block_bV[:rows].copy_(logits_bV), self.other_block_bV[:rows]
        if self.softcap is not None:
            z_bV.div_(self.softcap).tanh_().mul_(self.softcap * self.factor)
        elif self.factor != 1.0:
            z_bV.mul_(self.factor)
        # Shifted by each row's largest, so that sums and differences of large logits do not lose digits.
        largest_b1 = z_bV.amax(-1, keepdim=True)
        z_bV.sub_(largest_b1)
        torch.softmax(z_bV, -1, out=p_bV)
        log_sum_b = -p_bV.amax(-1).log()  # the largest z is 0, so its p is 1 / sum(exp z)
        logprobs_b = z_bV.gather(1, targets_b1)[:, 0] - log_sum_b
        z_bV.clamp_(min=torch.finfo(z_bV.dtype).min)  # for a logit of -inf p z must be 0, not NaN
        entropy_b = log_sum_b - z_bV.mul_(p_bV).sum(-1)
        return p_bV, Rows(logprobs_b, entropy_b, largest_b1[:, 0], log_sum_b)

    def _gradient(self, p_bV: torch.Tensor, targets_b1: torch.Tensor, rows: Rows, slopes: Slopes) -> torch.Tensor:
        """A block's gradient of the logits y, divided by `-factor`, [b, V].

        Needs no logits: log p determines them as exactly as logits of p's dtype would.
        """
        p_bV = self.block_bV[: p_bV.shape[0]].copy_(p_bV)
        p_bV.scatter_(1, targets_b1, rows.logprobs_n.exp()[:, None])  # exact, because 1 - p of the target must not lose digits
        log_p_bV = self.other_block_bV[: p_bV.shape[0]]
        torch.clamp(p_bV, min=torch.finfo(p_bV.dtype).tiny, out=log_p_bV).log_()  # for p = 0, p log p must be 0, not NaN
        logprob_b1 = 0.0 if slopes.logprob_n is None else slopes.logprob_n[:, None]
        if slopes.entropy_n is None:
            p_bV.mul_(logprob_b1)
        else:
            p_bV.mul_((log_p_bV + rows.entropy_n[:, None]).mul_(slopes.entropy_n[:, None]).add_(logprob_b1))
        if slopes.logprob_n is not None:
            p_bV.scatter_add_(1, targets_b1, -slopes.logprob_n[:, None])
        if self.softcap is not None:
            log_p_bV.scatter_(1, targets_b1, rows.logprobs_n[:, None])
            lse_b1 = (rows.largest_n + rows.log_sum_n)[:, None]
            capped_bV = log_p_bV.add_(lse_b1).div_(self.softcap * self.factor)
            p_bV.mul_(capped_bV.square_().neg_().add_(1.0))  # the derivative of tanh
        return p_bV
