"""The objectives' mathematics: values by hand, plain loops, and what all have in common. For TRL see test_trl_losses.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sample_groups import loss_on_leaves, random_groups

from rankup.grpo.algorithm.losses import (
    Counts,
    cispo,
    clipped_surrogate,
    entropy_bound,
    kl_k3,
    off_policy_keep,
    sapo,
    sequence_mean,
    sequence_ratio,
    token_weights,
)
from rankup.grpo.config import GRPOConfig
from rankup.grpo.config.algorithm import OBJECTIVES
from rankup.grpo.model.packing import pack
from rankup.grpo.update.objective import Objective, StepConstants

AGGREGATIONS = ["token_mean", "local_token_mean", "sequence_mean", "constant"]
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def doubles(count: int, *, seed: int = 0, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def counts_of(lengths: list[int], *, local: int | None = None, longest: int = 20) -> Counts:
    tokens = sum(lengths)
    return Counts(
        sequences=len(lengths),
        tokens=tokens,
        local_tokens=tokens if local is None else local,
        max_completion_length=longest,
    )


# ----------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4]])
def test_the_gradient_of_a_sequences_ratio(lengths: list[int]) -> None:
    log_ratio = doubles(sum(lengths)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: sequence_ratio(t, torch.tensor(lengths)), (log_ratio,))


# ----------------------------------------------------------------------------------------------------- surrogates


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.0),
        (1.5, 2.0, -2 * 1.28, 0.0),  # good and already likelier: held at 1 + epsilon_high
        (0.5, 2.0, -1.0, -2.0),  # good and become less likely: not held
        (0.5, -2.0, 2 * 0.8, 0.0),  # bad and already less likely: held at 1 - epsilon
        (1.5, -2.0, 3.0, 2.0),  # bad and become likelier: not held
    ],
)
def test_clipping_stops_only_ratios_outside_the_bounds(ratio: float, advantage: float, loss: float, slope: float) -> None:
    ratio_n = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss_n = clipped_surrogate(ratio_n, torch.tensor([advantage], dtype=torch.float64), epsilon=0.2, epsilon_high=0.28)
    assert loss_n.item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(loss_n.sum(), ratio_n)
    assert gradient.item() == pytest.approx(slope)


@pytest.mark.parametrize(("ratio", "slope"), [(2.9, 2.0), (3.1, 0.0), (50.0, 0.0)])
def test_delta_bounds_the_loss_of_negative_advantages(ratio: float, slope: float) -> None:
    ratio_n = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss_n = clipped_surrogate(
        ratio_n, torch.tensor([-2.0], dtype=torch.float64), epsilon=0.2, epsilon_high=0.28, delta=3.0
    )
    assert loss_n.item() == pytest.approx(2 * min(ratio, 3.0))
    assert torch.autograd.grad(loss_n.sum(), ratio_n)[0].item() == slope


def test_cispo_keeps_every_gradient_and_bounds_it() -> None:
    logprobs_n = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ratio_n = torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)
    loss_n = cispo(logprobs_n, ratio_n, torch.full((3,), 2.0, dtype=torch.float64), cap=5.0)
    assert torch.autograd.grad(loss_n.sum(), logprobs_n)[0].tolist() == pytest.approx([-0.2, -2.0, -10.0])


@settings(deadline=None)
@given(ratio=st.floats(0.01, 20), advantage=st.floats(-3, 3), positive=st.floats(0.1, 5), negative=st.floats(0.1, 5))
def test_sapo_gates_smoothly(ratio: float, advantage: float, positive: float, negative: float) -> None:
    """Its slope is the advantage at ratio 1 and falls to both sides as 4 p (1 - p)."""
    ratio_n = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss_n = sapo(ratio_n, torch.tensor([advantage], dtype=torch.float64), positive=positive, negative=negative)
    tau = positive if advantage > 0 else negative
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert loss_n.item() == pytest.approx(-gate * 4 / tau * advantage, rel=1e-6, abs=1e-6)
    slope = torch.autograd.grad(loss_n.sum(), ratio_n)[0].item()
    assert slope == pytest.approx(-4 * gate * (1 - gate) * advantage, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_on_policy_every_objective_is_the_policy_gradient(loss_type: str) -> None:
    """The gradient of each token is its advantage times its weight, whatever the surrogate."""
    (one,) = pack(random_groups([(4, [3, 1, 6]), (2, [5, 2])]), tokens_per_pack=1000)
    config = GRPOConfig(loss_type=loss_type, mode="none", veto=0.0, max_completion_length=9)
    counts = counts_of(one.lengths_S.tolist(), longest=9)
    logprobs_N = doubles(17, low=-3, high=0).float().requires_grad_()
    objective = Objective(config)
    constants = StepConstants(counts=counts, entropy_tokens=17)
    for old_N in (None, logprobs_N.detach().clone()):
        loss = objective.of(one, constants, old_logprobs_N=old_N, reference_logprobs_N=None)
        (gradient,) = torch.autograd.grad(loss_on_leaves(loss, logprobs_N, torch.ones(17)), logprobs_N)
        weights_N = token_weights(config.algorithm.loss_aggregation, one.lengths_S, counts)[one.sequence_N]
        torch.testing.assert_close(gradient, -one.advantages_N * weights_N)


# ----------------------------------------------------------------------------------------- sequences and penalties


@settings(deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_means_and_ratios_of_sequences_are_those_of_a_loop(lengths: list[int], seed: int) -> None:
    values_n, lengths_S = doubles(sum(lengths), seed=seed), torch.tensor(lengths)
    means = [piece.sum().item() / len(piece) for piece in values_n.split(lengths)]
    assert sequence_mean(values_n, lengths_S).tolist() == pytest.approx(means)
    ratios = [math.exp(mean) for mean, length in zip(means, lengths, strict=True) for _ in range(length)]
    assert sequence_ratio(values_n, lengths_S).tolist() == pytest.approx(ratios)


def test_the_ratio_of_a_sequence_has_gradients() -> None:
    lengths_S = torch.tensor([3, 1, 4])
    values_n = doubles(8).requires_grad_()
    assert torch.autograd.gradcheck(lambda values_n: sequence_ratio(values_n, lengths_S), values_n)


@settings(deadline=None)
@given(st.floats(-5, 0), st.floats(-5, 0))
def test_k3_is_never_negative_and_zero_only_for_equal_policies(policy: float, base: float) -> None:
    k3 = kl_k3(torch.tensor([policy], dtype=torch.float64), torch.tensor([base], dtype=torch.float64)).item()
    assert k3 == pytest.approx(math.exp(base - policy) - 1 - (base - policy), rel=1e-6, abs=1e-12)
    assert k3 >= 0
    if abs(policy - base) > 1e-3:
        assert k3 > 0


def test_k3_estimates_the_divergence() -> None:
    """Its mean under the policy is KL(policy || base)."""
    generator = torch.Generator().manual_seed(0)
    policy, base = torch.randn(2, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    expected = (policy.exp() * (policy - base)).sum()
    torch.testing.assert_close((policy.exp() * kl_k3(policy, base)).sum(), expected)


# ---------------------------------------------------------------------------------------------------------- masks


@settings(deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), threshold=st.floats(0.01, 0.5))
def test_the_off_policy_mask_is_that_of_a_loop(lengths: list[int], seed: int, threshold: float) -> None:
    tokens, lengths_S = sum(lengths), torch.tensor(lengths)
    logprobs_n, sampler_n = doubles(tokens, seed=seed), doubles(tokens, seed=seed + 1)
    advantages_S = doubles(len(lengths), seed=seed + 2)
    advantages_S[0] = 0.0
    expected = []
    for advantage, drift in zip(advantages_S.tolist(), (sampler_n - logprobs_n).split(lengths), strict=True):
        assume(abs(drift.mean().item() - threshold) > 1e-9)
        expected += [advantage >= 0 or drift.mean().item() <= threshold] * len(drift)
    kept_n = off_policy_keep(
        logprobs_n, sampler_n, advantages_S.repeat_interleave(lengths_S), lengths_S, threshold=threshold
    )
    assert kept_n.tolist() == expected


@settings(deadline=None)
@given(
    entropies=st.lists(st.floats(0, 8, width=32), min_size=1, max_size=60),
    quantile=st.floats(0.01, 1.0) | st.sampled_from([0.2, 0.1, 0.5, 0.8]),
)
def test_the_entropy_bound_is_torch_s_quantile(entropies: list[float], quantile: float) -> None:
    tensor = torch.tensor(entropies, dtype=torch.float64)
    measured = entropy_bound(tensor, quantile=quantile)
    torch.testing.assert_close(measured, torch.quantile(tensor, 1.0 - quantile), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("quantile", "reached"), [(0.2, 20), (0.5, 50), (0.01, 1), (1.0, 100)])
def test_the_requested_share_reaches_the_bound(quantile: float, reached: int) -> None:
    entropies = doubles(100, low=0, high=5).float()
    assert int((entropies >= entropy_bound(entropies, quantile=quantile)).sum()) == reached


# -------------------------------------------------------------------------------------------------------- weights


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=20), others=st.integers(0, 50))
def test_weights_are_those_of_their_mean(lengths: list[int], others: int) -> None:
    """`others`: completions of the step that are in other packs, of 7 tokens each."""
    lengths_S = torch.tensor(lengths)
    tokens, sequences = sum(lengths), len(lengths) + others
    counts = Counts(sequences=sequences, tokens=tokens + 7 * others, local_tokens=2 * tokens, max_completion_length=1000)
    sums = {
        "token_mean": tokens / counts.tokens,
        "local_token_mean": 0.5,
        "sequence_mean": len(lengths) / sequences,
        "constant": tokens / (sequences * 1000),
    }
    for aggregation in AGGREGATIONS:
        weights_S = token_weights(aggregation, lengths_S, counts)
        assert (weights_S * lengths_S).sum().item() == pytest.approx(sums[aggregation], rel=1e-5), aggregation
        if aggregation != "sequence_mean":
            assert len(set(weights_S.tolist())) == 1, "every token counts the same"
    per_sequence_S = token_weights("sequence_mean", lengths_S, counts) * lengths_S
    torch.testing.assert_close(per_sequence_S, torch.full_like(per_sequence_S, 1 / sequences))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_stay_on_the_device_of_the_lengths(aggregation: str) -> None:
    weights_S = token_weights(aggregation, torch.ones(3, dtype=torch.int64, device="meta"), counts_of([1, 1, 1]))
    assert (weights_S.device.type, weights_S.shape, weights_S.dtype) == ("meta", (3,), torch.float32)


def test_every_aggregation_of_the_configuration_has_its_weights() -> None:
    annotation: Any = GRPOConfig().algorithm.__class__.model_fields["loss_aggregation"].annotation
    assert set(annotation.__args__) == set(AGGREGATIONS)
