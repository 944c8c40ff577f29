"""Weights for the gap between the policy that sampled and the one that is trained.

Both have the same weights, but two programs round differently: w = exp(trainer's log-probability - sampler's) is not 1.
Weighting each token's loss by w makes the gradient that of the trainer's policy again (importance sampling); bounds keep its
variance finite. All functions are constant in the trained parameters.

Legend: n tokens, S completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..config.algorithm import CorrectionConfig
from .losses import kl_k3, sequence_mean
from .tally import Tally


def correction_weights(log_w_n: torch.Tensor, lengths_S: torch.Tensor | None, config: CorrectionConfig) -> torch.Tensor:
    """The factor of each token's loss [n].

    Args:
        log_w_n: trainer's minus sampler's log-probability of each token.
        lengths_S: of complete completions, concatenated; the sequence modes need it.
        config: says which weight, see there for the papers.
    """
    if config.mode == "none":
        return torch.ones_like(log_w_n)
    if config.mode.startswith("sequence"):
        assert lengths_S is not None, "a completion's mean needs complete completions"
        # The geometric mean and not the product, which falls with the length.
        log_w_n = sequence_mean(log_w_n, lengths_S).repeat_interleave(lengths_S, output_size=len(log_w_n))
    w_n = log_w_n.exp()
    if config.mode.endswith("truncate"):
        return w_n.clamp(max=config.cap)
    floor = config.floor if config.mode == "icepop" else 0.0
    return torch.where((w_n >= floor) & (w_n <= config.cap), w_n, 0.0)


def veto_keep(log_w_n: torch.Tensor, lengths_S: torch.Tensor, *, veto: float) -> torch.Tensor:
    """[n], False for all tokens of a completion that has one with w < veto."""
    lowest_S = torch.segment_reduce(log_w_n.exp(), "min", lengths=lengths_S, unsafe=True)
    return (lowest_S >= veto).repeat_interleave(lengths_S, output_size=len(log_w_n))


def gap_tally(logprobs_N: torch.Tensor, sampler_logprobs_N: torch.Tensor, weights_N: torch.Tensor) -> Tally:
    """The sums that `gap_metrics` needs of these tokens. `weights_N`: the correction weights that were applied."""
    log_w_N = logprobs_N - sampler_logprobs_N
    difference_N, w_N = log_w_N.abs(), log_w_N.exp()
    return Tally.of(
        sums={
            "difference": difference_N,
            "exp_difference": difference_N.exp(),
            "kl": kl_k3(sampler_logprobs_N, logprobs_N),
            "w": w_N,
            "w_squared": w_N.square(),
            "weights": weights_N,
        },
        extremes={"difference": difference_N, "weights": weights_N},
    )


def gap_metrics(tally: Tally) -> dict[str, float]:
    """How far trainer and sampler are apart on the step's tokens (bf16 arithmetic alone gives a mean difference of 0.01 to
    0.05).

    `sampling/kl` is the k3 estimate of KL(sampler || trainer) per token; the effective sample size is `1 / mean(w_hat^2)` with
    w_hat = w / mean(w), the share of the tokens that count.
    """
    w_squared = tally.mean("w_squared")  # 0 where every w is too small for its type
    return {
        "sampling/sampling_logp_difference/mean": tally.mean("difference"),
        "sampling/sampling_logp_difference/max": tally.highest["difference"],
        "sampling/mean_exp_abs_difference": tally.mean("exp_difference"),
        "sampling/kl": tally.mean("kl"),
        "sampling/effective_sample_size": tally.mean("w") ** 2 / w_squared if w_squared else math.nan,
        "sampling/importance_sampling_ratio/min": tally.lowest["weights"],
        "sampling/importance_sampling_ratio/mean": tally.mean("weights"),
        "sampling/importance_sampling_ratio/max": tally.highest["weights"],
    }


def sampling_warnings(
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float = 1.0,
    generation_kwargs: Sequence[str] = (),
) -> list[str]:
    """Warnings about sampling settings under which the sampled policy differs from the trained one.

    Args:
        generation_kwargs: those of `rollout.generation_kwargs` that change the distribution.
    """
    truncated = [
        f"{name} {value:g}"
        for name, value, off in (("top_p", top_p, 1.0), ("top_k", top_k, -1), ("min_p", min_p, 0.0))
        if value != off
    ]
    warnings = []
    if truncated:
        warnings.append(
            f"rollout.{' and rollout.'.join(truncated)}: tokens are drawn from a truncated distribution, "
            "so every ratio is biased, and guards may skip every update; sample without truncation (top_p 1, top_k -1, min_p 0)"
        )
    if repetition_penalty != 1.0:
        warnings.append(
            f"rollout.repetition_penalty {repetition_penalty:g}: tokens are drawn from another distribution than the trained "
            "one, so every ratio is biased, and guards may skip every update; the reward function repetition_penalty has no "
            "such effect"
        )
    if generation_kwargs:
        warnings.append(
            f"rollout.generation_kwargs, {' and '.join(generation_kwargs)}: tokens are drawn from another distribution than "
            "the trained one, so every ratio is biased, and guards may skip every update; a reward function for the same "
            "purpose has no such effect"
        )
    if temperature != 1.0:
        warnings.append(
            f"rollout.temperature {temperature:g}: the policy is trained for sampling at this temperature; "
            "evaluation is greedy, and sampling from the adapter at another temperature samples from another policy"
        )
    return warnings
