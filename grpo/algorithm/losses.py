"""The mathematics of the objectives, as pure functions of per-token tensors. All losses are minimised.

`update/objective.py` combines them as configured. A user-supplied objective (`algorithm.loss_type`, docs/extending.md) is a
function of the same kind: it takes `LossInputs` and returns the loss of each token [n], which is then weighted and summed.

    def reinforce(inputs):
        return -inputs.advantages * inputs.logprobs

Legend: n completion tokens, S completions they belong to. `logprobs` are the trained policy's, `old_logprobs` those of the
policy at the start of the step, both at the sampling temperature. rho = exp(logprob - old logprob); sg = stop gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

UserLoss = Callable[["LossInputs"], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Input of an objective: complete completions, their tokens concatenated.

    Attributes:
        logprobs, entropies: [n], with gradient.
        old_logprobs, sampler_logprobs, advantages: [n], constant.
        sequence: [n], the completion that each token belongs to, 0 to S - 1.
        lengths: [S], in tokens.
    """

    logprobs: torch.Tensor
    entropies: torch.Tensor
    old_logprobs: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    sequence: torch.Tensor
    lengths: torch.Tensor


# ------------------------------------------------------------------------------------------------- surrogates


def clipped_surrogate(
    ratio_n: torch.Tensor,
    advantages_n: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    """`-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)`, each token's [n].

    GRPO (arXiv 2402.03300, epsilon both ways); DAPO raises the upper bound ("clip-higher", arXiv 2503.14476). `delta` bounds
    rho itself where the advantage is negative and the clip does not (two-sided clip, arXiv 2505.07291).
    """
    clipped_n = ratio_n.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    bounded_n = ratio_n if delta is None else ratio_n.clamp(max=delta)
    return -torch.minimum(bounded_n * advantages_n, clipped_n * advantages_n)


def cispo(
    logprobs_n: torch.Tensor, ratio_n: torch.Tensor, advantages_n: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """`-sg(min(rho, cap)) A logprob`, each token's [n]: no token loses its gradient (CISPO, arXiv 2506.13585)."""
    return -ratio_n.detach().clamp(max=cap) * advantages_n * logprobs_n


def sapo(ratio_n: torch.Tensor, advantages_n: torch.Tensor, *, positive: float, negative: float) -> torch.Tensor:
    """`-sigmoid(tau (rho - 1)) (4 / tau) A`, each token's [n]: a smooth gate in place of the clip (SAPO, arXiv 2511.20347).

    tau is `positive` where A > 0 and `negative` elsewhere.
    """
    tau_n = torch.where(advantages_n > 0, positive, negative)
    return -torch.sigmoid(tau_n * (ratio_n - 1.0)) * (4.0 / tau_n) * advantages_n


# ----------------------------------------------------------------------------------------- ratios and penalties


def sequence_mean(values_n: torch.Tensor, lengths_S: torch.Tensor) -> torch.Tensor:
    """Each completion's mean [S] of its tokens' values, which stand one after the other."""
    # Unsafe: without two checks of the lengths, for each of which a GPU would be waited for.
    return torch.segment_reduce(values_n, "mean", lengths=lengths_S, unsafe=True)


def for_each_token(values_S: torch.Tensor, lengths_S: torch.Tensor, tokens: int) -> torch.Tensor:
    """Each completion's value for each of its tokens, [n]; `tokens` is the sum of the lengths."""
    return _ForEachToken.apply(values_S, lengths_S, tokens)  # type: ignore[return-value]


class _ForEachToken(torch.autograd.Function):
    """`repeat_interleave`, of which torch sums the gradient by atomics on CUDA, in an order that differs from run to run."""

    @staticmethod
    def forward(ctx: Any, values_S: torch.Tensor, lengths_S: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.save_for_backward(lengths_S)
        return values_S.repeat_interleave(lengths_S, output_size=tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (lengths_S,) = ctx.saved_tensors
        return torch.segment_reduce(grads[0].contiguous(), "sum", lengths=lengths_S, unsafe=True), None, None


def sequence_ratio(log_ratio_n: torch.Tensor, lengths_S: torch.Tensor) -> torch.Tensor:
    """`exp(mean log rho)`: the geometric mean over the completion, for each of its tokens [n] (GSPO, arXiv 2507.18071)."""
    return for_each_token(torch.exp(sequence_mean(log_ratio_n, lengths_S)), lengths_S, len(log_ratio_n))


def kl_k3(logprobs_n: torch.Tensor, reference_logprobs_n: torch.Tensor) -> torch.Tensor:
    """The k3 estimator of KL(policy || reference), each token's [n]: `exp(d) - 1 - d`, d = reference - policy. At least 0."""
    difference_n = reference_logprobs_n - logprobs_n
    return torch.expm1(difference_n) - difference_n


# ---------------------------------------------------------------------------------------------------- masks


def off_policy_keep(
    logprobs_n: torch.Tensor,
    sampler_logprobs_n: torch.Tensor,
    advantages_n: torch.Tensor,
    lengths_S: torch.Tensor,
    *,
    threshold: float,
) -> torch.Tensor:
    """[n], False for tokens of completions with A < 0 and mean(sampler logprob - logprob) > threshold, in nats.

    DeepSeek-V3.2's off-policy sequence mask (arXiv 2512.02556).
    """
    drift_S = sequence_mean(sampler_logprobs_n - logprobs_n, lengths_S)
    return (advantages_n >= 0) | (drift_S <= threshold).repeat_interleave(lengths_S, output_size=len(logprobs_n))


def entropy_bound(entropies: torch.Tensor, *, quantile: float) -> torch.Tensor:
    """Entropy (scalar) that the share `quantile` of the tokens reaches or exceeds (arXiv 2506.01939)."""
    # Not torch.quantile, which takes at most 2^24 values; this interpolates as it does.
    ordered = entropies.sort().values
    place = (1.0 - quantile) * (len(ordered) - 1)
    below = int(place)
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)


# -------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Denominators of the step's loss.

    Attributes:
        sequences, tokens: completions and their tokens, of all workers.
        local_tokens: tokens of this worker.
        workers: how many workers share the step.
        max_completion_length: in tokens.
    """

    sequences: int
    tokens: int
    local_tokens: int
    workers: int = 1
    max_completion_length: int


def token_weights(aggregation: str, lengths_S: torch.Tensor, counts: Counts) -> torch.Tensor:
    """The weight of each token in the step's loss, one number [S] for all tokens of a completion, in fp32.

    token_mean: the mean over all tokens (DAPO, arXiv 2503.14476).
    local_token_mean: the mean over the workers of each worker's mean over its tokens (bnpo, as in TRL).
    sequence_mean: the mean over completions of their means (GRPO, arXiv 2402.03300).
    constant: the sum over completions times the longest length allowed (Dr. GRPO, arXiv 2503.20783).
    """
    if aggregation == "sequence_mean":
        return 1.0 / (lengths_S.float() * counts.sequences)
    divisors = {
        "token_mean": counts.tokens,
        "local_token_mean": counts.local_tokens * counts.workers,
        "constant": counts.sequences * counts.max_completion_length,
    }
    return torch.full_like(lengths_S, 1.0 / divisors[aggregation], dtype=torch.float32)
