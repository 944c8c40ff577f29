"""Attention in plain torch, in fp32, and with it torch's flash attention.

Q: query tokens of a sequence, L: its key tokens, H and K: query and key heads, D: width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Which keys a query sees, aligned at the last tokens: none behind it if causal, at most `left` before, `right` behind."""

    causal: bool
    left: int | None = None
    right: int | None = None

    def hidden(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """True where a key is not seen."""
        place_Q1 = torch.arange(queries, device=device)[:, None] + keys - queries
        place_1L = torch.arange(keys, device=device)[None, :]
        right = 0 if self.causal else self.right
        hidden_QL = torch.zeros(queries, keys, dtype=torch.bool, device=device)
        if right is not None and right >= 0:
            hidden_QL |= place_1L > place_Q1 + right
        if self.left is not None and self.left >= 0:
            hidden_QL |= place_1L < place_Q1 - self.left
        return hidden_QL


def attend(q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, scale: float, window: Window) -> tuple[Tensor, Tensor]:
    """Output [Q, H, D] and log-sum-exp [H, Q] of one sequence in fp32."""
    weights_HQL, lse_HQ = _weights(q_QHD, k_LKD, scale, window)
    return torch.einsum("hql,lhd->qhd", weights_HQL, _repeated(v_LKD, q_QHD)), lse_HQ


def _weights(q_QHD: Tensor, k_LKD: Tensor, scale: float, window: Window) -> tuple[Tensor, Tensor]:
    scores_HQL = torch.einsum("qhd,lhd->hql", q_QHD, _repeated(k_LKD, q_QHD)) * scale
    hidden_QL = window.hidden(q_QHD.shape[0], k_LKD.shape[0], q_QHD.device)
    scores_HQL = scores_HQL.masked_fill(hidden_QL, float("-inf"))
    return scores_HQL.softmax(-1), scores_HQL.logsumexp(-1)


def _repeated(x_LKD: Tensor, q_QHD: Tensor) -> Tensor:
    """Each key head for all query heads that share it: [L, H, D]."""
    return x_LKD.repeat_interleave(q_QHD.shape[1] // x_LKD.shape[1], 1)


def _attend_backward(
    q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, grad_QHD: Tensor, scale: float, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    weights_HQL, _ = _weights(q_QHD, k_LKD, scale, window)
    dv_LHD = torch.einsum("hql,qhd->lhd", weights_HQL, grad_QHD)
    dweights_HQL = torch.einsum("qhd,lhd->hql", grad_QHD, _repeated(v_LKD, q_QHD))
    dscores_HQL = weights_HQL * (dweights_HQL - (weights_HQL * dweights_HQL).sum(-1, keepdim=True)) * scale
    dq_QHD = torch.einsum("hql,lhd->qhd", dscores_HQL, _repeated(k_LKD, q_QHD))
    dk_LHD = torch.einsum("hql,qhd->lhd", dscores_HQL, q_QHD)
    dk_LKD, dv_LKD = (g.unflatten(1, (k_LKD.shape[1], -1)).sum(2) for g in (dk_LHD, dv_LHD))
    return dq_QHD, dk_LKD, dv_LKD


def _sequences(q: Tensor, cum_q: Tensor | None, cum_k: Tensor | None) -> Iterator[tuple[Any, Any]]:
    """The places of each sequence in the queries and in the keys: of a batch, or of a packed row by cumulative lengths."""
    if cum_q is None or cum_k is None:
        yield from ((row, row) for row in range(q.shape[0]))
        return
    ends_q, ends_k = cum_q.tolist(), cum_k.tolist()
    for i in range(1, len(ends_q)):
        yield slice(ends_q[i - 1], ends_q[i]), slice(ends_k[i - 1], ends_k[i])


def flash_forward(  # the operator's arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_q: Tensor | None,
    cum_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward`, with checks of what its kernel would read wrongly."""
    assert dropout_p == 0 and seqused_k is None and alibi_slopes is None, "not computed on the null device"
    if cum_q is not None and cum_k is not None:
        assert cum_q.dtype == cum_k.dtype == torch.int32
        assert int(cum_q[-1]) == q.shape[0] and int(cum_k[-1]) == k.shape[0]
        assert max_q >= int(cum_q.diff().max()) and max_k >= int(cum_k.diff().max())
    window = Window(is_causal, window_size_left, window_size_right)
    out = torch.empty_like(q)
    heads_and_rows = (q.shape[-2], q.shape[0]) if cum_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.zeros(heads_and_rows, device=q.device)
    for of_q, of_k in _sequences(q, cum_q, cum_k):
        one, lse_HQ = attend(q[of_q].float(), k[of_k].float(), v[of_k].float(), scale or q.shape[-1] ** -0.5, window)
        out[of_q] = one.to(q.dtype)
        lse[(slice(None), of_q) if cum_q is not None else of_q] = lse_HQ
    seed, offset = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    return out, lse, seed, offset, torch.empty(0, dtype=q.dtype, device=q.device)


def flash_backward(  # the operator's arguments
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_q: Tensor | None,
    cum_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten::_flash_attention_backward`."""
    window = Window(is_causal, window_size_left, window_size_right)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for of_q, of_k in _sequences(q, cum_q, cum_k):
        of_sequence = (q[of_q].float(), k[of_k].float(), v[of_k].float(), grad[of_q].float())
        grads = _attend_backward(*of_sequence, scale or q.shape[-1] ** -0.5, window)
        dq[of_q], dk[of_k], dv[of_k] = (g.to(q.dtype) for g in grads)
    return dq, dk, dv
