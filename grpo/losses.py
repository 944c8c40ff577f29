"""The objectives, as pure functions of per-token tensors. All of them are minimised.

Legend: N completion tokens of a pack, S completions of a step. `logprobs` are the trained policy's, `old_logprobs` those
of the policy at the start of the step, both at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .config import AlgorithmConfig

if TYPE_CHECKING:
    from ..kernels.logprob import TokenLoss
    from .packing import Pack


def clipped_surrogate(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
) -> torch.Tensor:
    """`-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)`, rho = exp(logprob - old logprob), each token's [N].

    GRPO (arXiv 2402.03300, epsilon both ways); DAPO raises the upper bound ("clip-higher", arXiv 2503.14476).
    """
    ratio_N = torch.exp(logprobs_N - old_logprobs_N)
    clipped_N = ratio_N.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def kl_k3(logprobs_N: torch.Tensor, base_logprobs_N: torch.Tensor) -> torch.Tensor:
    """The k3 estimator of KL(policy || base), each token's [N]: `exp(d) - 1 - d`, d = base - policy. Never negative."""
    difference_N = base_logprobs_N - logprobs_N
    return torch.expm1(difference_N) - difference_N


def grpo_weights(lengths_S: torch.Tensor) -> torch.Tensor:
    """Weight of every token of each completion [S]: the sum is the mean of the completions' means (arXiv 2402.03300)."""
    return 1.0 / (lengths_S * len(lengths_S))


def dapo_weights(lengths_S: torch.Tensor) -> torch.Tensor:
    """Weight of every token of each completion [S] so that the sum is the mean over all tokens (arXiv 2503.14476)."""
    return torch.ones_like(lengths_S, dtype=torch.float32) / lengths_S.sum()


TOKEN_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"grpo": grpo_weights, "dapo": dapo_weights}


def token_loss(
    algorithm: AlgorithmConfig,
    pack: Pack,
    weights_N: torch.Tensor,
    *,
    old_logprobs_N: torch.Tensor | None,
    base_logprobs_N: torch.Tensor | None,
) -> TokenLoss:
    """The objective of one pack, in the form that `linear_logprob_loss` takes.

    Args:
        weights_N: each token's share of the step's loss.
        old_logprobs_N: None where the policy is still the one that the step began with: the ratio is then exactly 1.
        base_logprobs_N: needed where `algorithm.beta` is above 0.
    """
    assert (base_logprobs_N is None) == (algorithm.beta == 0.0)

    def loss(logprobs_n: torch.Tensor, _entropy_n: torch.Tensor, chunk: slice) -> torch.Tensor:
        old_n = logprobs_n.detach() if old_logprobs_N is None else old_logprobs_N[chunk]
        loss_n = clipped_surrogate(
            logprobs_n,
            old_n,
            pack.advantages_N[chunk],
            epsilon=algorithm.epsilon,
            epsilon_high=algorithm.epsilon_high,
        )
        if base_logprobs_N is not None:
            loss_n = loss_n + algorithm.beta * kl_k3(logprobs_n, base_logprobs_N[chunk])
        return loss_n * weights_N[chunk]

    return loss
