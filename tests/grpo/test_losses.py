"""The objectives, against GRPO's and DAPO's formulas written out on padded rows as TRL computes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_groups import random_groups

from rankup.grpo.config import AlgorithmConfig
from rankup.grpo.losses import TOKEN_WEIGHTS, clipped_surrogate, kl_k3, token_loss
from rankup.grpo.packing import Pack, pack

LENGTHS = [3, 1, 5, 2]


@pytest.fixture
def one() -> Pack:
    (only,) = pack(random_groups([(4, LENGTHS[:2]), (2, LENGTHS[2:])]), tokens_per_pack=1000)
    return only


def on_rows(values_N: torch.Tensor) -> torch.Tensor:
    """Per-token values as one padded row a completion."""
    return torch.nn.utils.rnn.pad_sequence(list(values_N.split(LENGTHS)), batch_first=True)


def loss_on_rows(
    algorithm: AlgorithmConfig,
    logprobs_N: torch.Tensor,
    old_N: torch.Tensor,
    base_N: torch.Tensor,
    advantages_N: torch.Tensor,
) -> torch.Tensor:
    """The loss from its definition: a masked table of completions."""
    logprobs, old, base, advantages = map(on_rows, (logprobs_N, old_N, base_N, advantages_N))
    mask = on_rows(torch.ones(sum(LENGTHS)))
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 1 - algorithm.epsilon, 1 + algorithm.epsilon_high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    per_token = per_token + algorithm.beta * (torch.exp(base - logprobs) - (base - logprobs) - 1)
    if algorithm.loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()
    return (per_token * mask).sum() / mask.sum()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("off_policy", [False, True])
def test_loss_and_gradient_are_those_of_the_definition(one: Pack, loss_type: str, beta: float, off_policy: bool) -> None:
    algorithm = AlgorithmConfig(loss_type=loss_type, beta=beta, epsilon=0.1, epsilon_high=0.3)  # type: ignore[arg-type]
    torch.manual_seed(0)
    logprobs_N = (-3 * torch.rand(sum(LENGTHS))).requires_grad_()
    old_N = logprobs_N.detach() + (torch.rand(sum(LENGTHS)) - 0.5 if off_policy else 0.0)
    base_N = logprobs_N.detach() + torch.rand(sum(LENGTHS)) - 0.5
    function = token_loss(
        algorithm,
        one,
        TOKEN_WEIGHTS[loss_type](one.lengths_S)[one.sequence_N],
        old_logprobs_N=old_N if off_policy else None,
        base_logprobs_N=base_N if beta else None,
    )
    chunks = [slice(0, 4), slice(4, 5), slice(5, sum(LENGTHS))]  # it is called with the tokens of a chunk
    loss = torch.cat([function(logprobs_N[s], torch.zeros(1), s) for s in chunks]).sum()
    expected = loss_on_rows(algorithm, logprobs_N, old_N, base_N, one.advantages_N)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs_N), torch.autograd.grad(expected, logprobs_N))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (0.0, 2.0, -2.0, -2.0),
        (math.log(1.2), 2.0, -2.4, -2.4),
        (math.log(1.5), 2.0, -2 * 1.28, 0.0),  # good and already likelier: held at 1 + epsilon_high
        (math.log(0.5), 2.0, -1.0, -1.0),  # good and become less likely: not held
        (math.log(0.5), -2.0, 2 * 0.8, 0.0),  # bad and already less likely: held at 1 - epsilon
        (math.log(1.5), -2.0, 3.0, 3.0),  # bad and become likelier: not held
    ],
)
def test_clipping_holds_back_only_what_went_far_enough(log_ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprobs_N = torch.tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    old_N, advantages_N = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss_N = clipped_surrogate(logprobs_N, old_N, advantages_N, epsilon=0.2, epsilon_high=0.28)
    assert loss_N.item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(loss_N.sum(), logprobs_N)
    assert gradient.item() == pytest.approx(slope)


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
    torch.manual_seed(0)
    policy, base = torch.randn(2, 30, dtype=torch.float64).log_softmax(-1)
    expected = (policy.exp() * (policy - base)).sum()
    torch.testing.assert_close((policy.exp() * kl_k3(policy, base)).sum(), expected)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_weights_are_those_of_a_mean(lengths: list[int]) -> None:
    lengths_S = torch.tensor(lengths)
    for name, weights in TOKEN_WEIGHTS.items():
        weights_S = weights(lengths_S)
        assert (weights_S * lengths_S).sum().item() == pytest.approx(1.0, rel=1e-5), name
    dapo_S, grpo_S = (TOKEN_WEIGHTS[name](lengths_S) for name in ("dapo", "grpo"))
    assert len(set(dapo_S.tolist())) == 1, "every token counts the same"
    torch.testing.assert_close(grpo_S * lengths_S, torch.full((len(lengths),), 1 / len(lengths)))


@pytest.mark.parametrize("loss_type", sorted(TOKEN_WEIGHTS))
def test_weights_stay_on_the_device_of_the_lengths(loss_type: str) -> None:
    weights_S = TOKEN_WEIGHTS[loss_type](torch.ones(3, dtype=torch.int64, device="meta"))
    assert (weights_S.device.type, weights_S.shape, weights_S.dtype) == ("meta", (3,), torch.float32)


def test_every_loss_of_the_configuration_has_its_weights() -> None:
    assert set(TOKEN_WEIGHTS) == set(AlgorithmConfig.model_fields["loss_type"].annotation.__args__)  # type: ignore[union-attr]
