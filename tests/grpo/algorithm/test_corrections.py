"""Weights for the gap between sampler and trainer: definitions written out, vetoes, metrics, and warnings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.algorithm.corrections import correction_weights, gap_metrics, gap_tally, sampling_warnings, veto_keep
from rankup.grpo.config import CorrectionConfig
from rankup.grpo.config.algorithm import CORRECTION_MODES
from rankup.rollout.generation_kwargs import GenerationKwargs

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def log_weights(lengths: list[int], seed: int, *, width: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return width * (torch.rand(sum(lengths), generator=generator, dtype=torch.float64) - 0.5)


def by_definition(log_w: list[float], lengths: list[int], config: CorrectionConfig) -> list[float]:
    """The weight of every token, number by number."""
    weights, start = [], 0
    for length in lengths:
        of_sequence = log_w[start : start + length]
        start += length
        geometric_mean = math.prod(math.exp(value) for value in of_sequence) ** (1 / length)
        for value in of_sequence:
            w = geometric_mean if config.mode.startswith("sequence") else math.exp(value)
            weights.append(
                {
                    "none": 1.0,
                    "token_truncate": min(w, config.cap),
                    "sequence_truncate": min(w, config.cap),
                    "token_mask": w if w <= config.cap else 0.0,
                    "sequence_mask": w if w <= config.cap else 0.0,
                    "icepop": w if config.floor <= w <= config.cap else 0.0,
                }[config.mode]
            )
    return weights


@settings(deadline=None, max_examples=200)
@given(
    mode=st.sampled_from(CORRECTION_MODES),
    lengths=LENGTHS,
    seed=st.integers(0, 999),
    cap=st.none() | st.floats(0.6, 4.0),
)
def test_weights_are_those_of_the_definition(mode: str, lengths: list[int], seed: int, cap: float | None) -> None:
    config = CorrectionConfig(mode=mode, cap=cap)  # type: ignore[arg-type]
    log_w_n = log_weights(lengths, seed)
    weights_n = correction_weights(log_w_n, torch.tensor(lengths), config)
    assert weights_n.tolist() == pytest.approx(by_definition(log_w_n.tolist(), lengths, config))


@pytest.mark.parametrize("mode", ["none", "token_truncate", "token_mask", "icepop"])
def test_token_weights_need_no_complete_completions(mode: str) -> None:
    config = CorrectionConfig(mode=mode)  # type: ignore[arg-type]
    log_w_n = log_weights([9], 0)
    chunks = [correction_weights(part, None, config) for part in log_w_n.split([2, 4, 3])]
    assert torch.equal(torch.cat(chunks), correction_weights(log_w_n, torch.tensor([9]), config))


@pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask"])
def test_the_weight_of_a_sequence_does_not_decay_with_its_length(mode: str) -> None:
    """The same noise a token: the product falls (or rises) by orders of magnitude, the geometric mean stays."""
    config = CorrectionConfig(mode=mode)  # type: ignore[arg-type]
    for length in (10, 100, 1000):
        log_w_n = torch.tensor([-0.1, 0.04], dtype=torch.float64).repeat(length // 2)
        weights_n = correction_weights(log_w_n, torch.tensor([length]), config)
        assert weights_n.tolist() == pytest.approx([math.exp(-0.03)] * length)


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_far_apart_is_bounded_and_finite(mode: str) -> None:
    config = CorrectionConfig(mode=mode)  # type: ignore[arg-type]
    weights_n = correction_weights(torch.tensor([500.0, -500.0, 0.0]), torch.tensor([1, 1, 1]), config)
    assert weights_n.isfinite().all() and weights_n.max() <= config.cap and weights_n[2] == 1.0


@settings(deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), veto=st.floats(0.05, 0.9))
def test_a_veto_leaves_out_completions_with_an_impossible_token(lengths: list[int], seed: int, veto: float) -> None:
    log_w_n = log_weights(lengths, seed)
    expected = [bool((piece.exp() >= veto).all()) for piece in log_w_n.split(lengths) for _ in piece]
    assert veto_keep(log_w_n, torch.tensor(lengths), veto=veto).tolist() == expected


def test_metrics_of_the_gap() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
    sampler_N = torch.tensor([-1.1, -1.7, -0.5, -3.4], dtype=torch.float64)
    log_w = [0.1, -0.3, 0.0, 0.4]
    w = [math.exp(x) for x in log_w]
    metrics = gap_metrics(gap_tally(logprobs_N, sampler_N, torch.tensor([1.0, 0.5, 1.0, 1.2], dtype=torch.float64)))
    assert metrics == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": 0.2,
            "sampling/sampling_logp_difference/max": 0.4,
            "sampling/mean_exp_abs_difference": sum(math.exp(abs(x)) for x in log_w) / 4,
            "sampling/kl": sum(math.exp(x) - 1 - x for x in log_w) / 4,
            "sampling/effective_sample_size": sum(w) ** 2 / (4 * sum(x * x for x in w)),
            "sampling/importance_sampling_ratio/min": 0.5,
            "sampling/importance_sampling_ratio/mean": 0.925,
            "sampling/importance_sampling_ratio/max": 1.2,
        }
    )


def test_the_effective_sample_size_is_a_share() -> None:
    """1 for equal weights, 1/N where one token has all the weight."""
    weights_N = torch.ones(8)
    same = gap_metrics(gap_tally(torch.full((8,), -1.0), torch.full((8,), -1.5), weights_N))
    assert same["sampling/effective_sample_size"] == pytest.approx(1.0)
    one = gap_metrics(gap_tally(torch.tensor([0.0] + [-40.0] * 7), torch.tensor([-9.0] + [-1.0] * 7), weights_N))
    assert one["sampling/effective_sample_size"] == pytest.approx(1 / 8)


def test_the_divergence_is_from_sampler_to_trainer() -> None:
    """Its mean under the sampler is KL(sampler || trainer)."""
    generator = torch.Generator().manual_seed(0)
    trainer, sampler = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    draws = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=generator)
    measured = gap_metrics(gap_tally(trainer[draws], sampler[draws], torch.ones(1)))["sampling/kl"]
    assert measured == pytest.approx((sampler.exp() * (sampler - trainer)).sum().item(), rel=0.02)


def test_sampling_without_truncation_needs_no_warning() -> None:
    assert sampling_warnings(temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0) == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"top_p": 0.9}, ["rollout.top_p 0.9: ", "biased"]),
        ({"top_k": 20, "min_p": 0.05}, ["rollout.top_k 20 and rollout.min_p 0.05: ", "biased"]),
        ({"temperature": 0.7}, ["rollout.temperature 0.7: ", "greedy"]),
    ],
)
def test_sampling_from_a_part_is_warned_of(settings: dict[str, float], parts: list[str]) -> None:
    untruncated = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    (warning,) = sampling_warnings(**(untruncated | settings))  # type: ignore[arg-type]
    assert all(part in warning for part in parts), warning


def test_arguments_that_change_the_distribution_are_warned_of_by_name() -> None:
    kwargs = GenerationKwargs(min_tokens=2, stop_token_ids=[5], ignore_eos=True, logit_bias={3: 1.0})
    (warning,) = sampling_warnings(
        temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, generation_kwargs=kwargs.that_change_the_distribution
    )
    assert warning.startswith("rollout.generation_kwargs, min_tokens and logit_bias: tokens are drawn from another ")
    assert GenerationKwargs(stop_token_ids=[5], ignore_eos=True).that_change_the_distribution == []


def test_both_kinds_of_warnings_come_together() -> None:
    assert len(sampling_warnings(temperature=0.7, top_p=0.9, top_k=-1, min_p=0.0)) == 2
