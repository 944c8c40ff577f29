"""Reference for log-probabilities: plain autograd over full logits, on random hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch

from rankup.kernels.logprob import Head
from rankup.kernels.lora import Adapter

Case = tuple[torch.Tensor, Head, torch.Tensor]  # hidden states, head, targets


def make_case(
    tokens: int,
    *,
    hidden: int = 6,
    vocabulary: int = 11,
    rank: int = 0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **head: Any,
) -> Case:
    """Hidden states (requiring grad), a head (for rank > 0 with an adapter whose master weights require grad) and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden_ND, weight_VD = normal(tokens, hidden).requires_grad_(), normal(vocabulary, hidden)
    adapter = None
    if rank:
        adapter = make_adapter(normal(rank, hidden) / hidden**0.5, normal(vocabulary, rank), scaling=0.5)
    targets_N = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden_ND, Head(weight_VD=weight_VD, adapter=adapter, **head), targets_N


def make_adapter(a_RD: torch.Tensor, b_VR: torch.Tensor, scaling: float) -> Adapter:
    """Operands in `dtype`, b scaled; master weights in fp32 or fp64."""
    accumulator = torch.promote_types(a_RD.dtype, torch.float32)
    masters = (a_RD.to(accumulator).requires_grad_(), b_VR.to(accumulator).requires_grad_())
    return Adapter(*masters, a_RD.detach(), b_VR.detach() * scaling, scaling)


def leaves(hidden_ND: torch.Tensor, head: Head) -> list[torch.Tensor]:
    """All tensors that get a gradient."""
    return [hidden_ND] if head.adapter is None else [hidden_ND, head.adapter.master_a, head.adapter.master_b]


def from_full_logits(
    hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row, differentiable in the master weights too."""
    logits_NV = hidden_ND @ head.weight_VD.t()
    if head.adapter is not None:
        a_RD, b_VR = (master.to(hidden_ND.dtype) for master in (head.adapter.master_a, head.adapter.master_b))
        logits_NV = logits_NV + hidden_ND @ a_RD.t() @ (head.adapter.scaling * b_VR).t()
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    log_softmax_NV = (logits_NV * head.scale / temperature).log_softmax(-1)
    entropy_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
    return log_softmax_NV.gather(1, targets_N[:, None])[:, 0], entropy_N
