"""The update: schedule, optimizer step, what skips it, several iterations, and its metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_groups import make_group, random_groups

from rankup.grpo.config import GRPOConfig, OptimConfig
from rankup.grpo.learner import Learner, learning_rate
from rankup.grpo.packing import WeightedGroup
from rankup.grpo.policy import Policy

SHAPES = [(7, [5, 1, 9, 4]), (3, [3, 6]), (12, [2, 8])]

# The first AdamW step is the sign of the gradient, which noise decides where the gradient is small. With an epsilon far above
# the gradient it is proportional to the gradient instead, and updates can be compared.
PROPORTIONAL = {"adam_epsilon": 1e4, "learning_rate": 1e3}


@pytest.fixture
def make_learner(make_policy) -> Callable[..., Learner]:
    """A learner on a policy with a strong adapter, published; `options` are `GRPOConfig`'s."""

    def make(kind: str = "llama", **options: Any) -> Learner:
        policy: Policy = make_policy(kind)
        policy.write_slots()
        return Learner(policy, GRPOConfig(**options))

    return make


@pytest.fixture
def groups() -> list[WeightedGroup]:
    return random_groups(SHAPES)


def copies(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.masters]


def base_hash(policy: Policy) -> str:
    """Of everything that is not trained."""
    digest = hashlib.sha256()
    for name, parameter in policy.model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


# Schedule


def rates(**options: Any) -> list[float]:
    optim = OptimConfig(**{"learning_rate": 1.0, "max_steps": 8} | options)
    return [learning_rate(optim, step) for step in range(optim.max_steps)]


def test_constant_rate() -> None:
    assert rates() == [1.0] * 8
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_rate_falls_to_zero_at_the_end() -> None:
    assert rates(lr_scheduler_type="linear") == [1 - step / 8 for step in range(8)]
    assert rates(lr_scheduler_type="linear", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_rate() -> None:
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(lr_scheduler_type="cosine") == pytest.approx(expected)
    assert rates(lr_scheduler_type="cosine", warmup_steps=6)[5:] == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 7])
def test_every_step_trains_and_the_peak_is_reached(kind: str, warmup_steps: int) -> None:
    values = rates(lr_scheduler_type=kind, warmup_steps=warmup_steps)
    assert max(values) == 1.0 and min(values) > 0.0


# Updates


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_an_update_makes_good_completions_likelier_and_bad_ones_less_likely(make_learner, kind: str) -> None:
    good, bad = random_groups([(5, [6, 4]), (5, [6, 4])])
    groups = [
        WeightedGroup(group=good.group, advantages=(1.0, 1.0)),
        WeightedGroup(group=bad.group, advantages=(-1.0, -1.0)),
    ]
    learner: Learner = make_learner(kind, learning_rate=1e-3)
    policy = learner.policy
    (one,) = learner._packs(groups)
    before, _ = policy.logprobs(one)
    assert len(before) == 20
    learner.update(groups, step=0)
    policy.write_slots()
    change = policy.logprobs(one)[0] - before
    assert change[:10].sum() > 0.1 and change[10:].sum() < -0.1


def test_updates_move_every_master_and_nothing_of_the_base(make_learner, groups: list[WeightedGroup]) -> None:
    learner: Learner = make_learner(learning_rate=1e-3)
    before, base_before = copies(learner.policy), base_hash(learner.policy)
    for step in range(3):
        learner.update(groups, step=step)
        learner.policy.write_slots()
    after = copies(learner.policy)
    assert not any(map(torch.equal, before, after))
    assert all(parameter.isfinite().all() for parameter in after)
    assert base_hash(learner.policy) == base_before
    assert all(parameter.grad is None for parameter in learner.policy.masters), "gradients do not wait in memory"


def test_the_schedule_sets_the_rate_of_the_step(make_learner, groups: list[WeightedGroup]) -> None:
    moves = []
    for step in (0, 5):
        learner: Learner = make_learner(**PROPORTIONAL, lr_scheduler_type="linear", max_steps=10)
        before = copies(learner.policy)
        metrics = learner.update(groups, step=step)
        assert metrics["learning_rate"] == 1e3 * (1 - step / 10)
        moves.append(torch.cat([(p - q).flatten() for p, q in zip(copies(learner.policy), before, strict=True)]))
    torch.testing.assert_close(moves[1], 0.5 * moves[0], rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_update_of_many_packs_equals_that_of_one(
    make_learner, groups: list[WeightedGroup], kind: str, loss_type: str
) -> None:
    results = []
    for budget in (10_000, 40, 1):
        learner: Learner = make_learner(kind, **PROPORTIONAL, tokens_per_pack=budget, loss_type=loss_type, beta=0.1)
        before = copies(learner.policy)
        metrics = learner.update(groups, step=0)
        moved = torch.cat([(p - q).flatten() for p, q in zip(copies(learner.policy), before, strict=True)])
        results.append((moved, metrics))
    (expected, expected_metrics), *others = results
    assert expected.norm() > 1e-3
    for moved, metrics in others:
        assert (moved - expected).norm() <= 1e-3 * expected.norm()
        for name in ("loss", "grad_norm", "entropy", "kl", "sampling/kl"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name


def test_gradients_are_clipped_to_the_norm(make_learner, groups: list[WeightedGroup]) -> None:
    norms = []
    for max_grad_norm in (1e6, 0.01):
        learner: Learner = make_learner(**PROPORTIONAL, max_grad_norm=max_grad_norm)
        before = copies(learner.policy)
        metrics = learner.update(groups, step=0)
        assert metrics["grad_norm"] > 0.1, "it is the norm before clipping"
        moved = torch.cat([(p - q).flatten() for p, q in zip(copies(learner.policy), before, strict=True)]).norm().item()
        norms.append((moved, metrics["grad_norm"]))
    (free, grad_norm), (clipped, _) = norms
    assert clipped / free == pytest.approx(0.01 / grad_norm, rel=0.02)


@pytest.mark.parametrize("groups", [[], [make_group([5, 6], [[], []], advantages=[1.0, -1.0])]])
def test_nothing_to_train_on_is_no_update(make_learner, groups: list[WeightedGroup]) -> None:
    learner: Learner = make_learner()
    before = copies(learner.policy)
    assert learner.update(groups, step=0) == {}
    assert all(map(torch.equal, before, learner.policy.masters))


@pytest.mark.parametrize("advantage", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_step(make_learner, groups: list[WeightedGroup], advantage: float) -> None:
    learner: Learner = make_learner(learning_rate=1e-3)
    learner.update(groups, step=0)
    learner.policy.write_slots()
    before = copies(learner.policy)
    state = [{k: v.clone() for k, v in learner.optimizer.state[p].items()} for p in learner.policy.masters]
    broken = WeightedGroup(group=groups[0].group, advantages=(advantage, 1.0, 1.0, 1.0))
    metrics = learner.update([broken, *groups[1:]], step=1)
    assert metrics["update_skipped"] == 1.0 and not math.isfinite(metrics["grad_norm"])
    assert all(map(torch.equal, before, learner.policy.masters))
    for parameter, entries in zip(learner.policy.masters, state, strict=True):
        assert all(torch.equal(learner.optimizer.state[parameter][key], value) for key, value in entries.items())
    # And the next step is as if it had not been.
    assert learner.update(groups, step=2)["update_skipped"] == 0.0
    assert not any(map(torch.equal, before, learner.policy.masters))


# Iterations


def test_every_iteration_is_a_step_with_what_was_just_learnt(make_learner, groups: list[WeightedGroup]) -> None:
    """Two iterations: the second one's forward has the masters that the first one's step made."""
    learner: Learner = make_learner(**PROPORTIONAL, num_iterations=2)
    policy = learner.policy
    first: Learner = make_learner(**PROPORTIONAL)
    first.update(groups, step=0)
    metrics = learner.update(groups, step=0)
    for layer, other in zip(policy.layers.values(), first.policy.layers.values(), strict=True):
        torch.testing.assert_close(layer.slot.a[:16], other.master_a.detach(), rtol=1e-4, atol=1e-6)
        b = layer.scaling["default"] * other.master_b.detach()
        torch.testing.assert_close(layer.slot.b[:, :16], b, rtol=1e-4, atol=1e-6)
        assert not torch.equal(layer.slot.a[:16], layer.master_a), "the last step is published by whoever called"
    assert metrics["update_skipped"] == 0.0


def test_the_ratio_is_to_the_policy_that_the_step_began_with(make_learner, groups: list[WeightedGroup]) -> None:
    """A large first step pushes ratios beyond the clip; the second iteration's gradient is then held back."""
    norms = []
    for epsilon, epsilon_high in [(0.01, 0.01), (1.0, 100.0)]:
        learner: Learner = make_learner(
            learning_rate=3e-3, num_iterations=2, epsilon=epsilon, epsilon_high=epsilon_high
        )
        norms.append(learner.update(groups, step=0)["grad_norm"])
    assert norms[0] < 0.7 * norms[1]


# Metrics


@pytest.mark.parametrize(("num_iterations", "beta", "forwards"), [(1, 0.0, 1), (1, 0.1, 2), (3, 0.0, 3), (3, 0.1, 4)])
def test_no_forward_that_is_not_needed(
    make_learner, groups: list[WeightedGroup], num_iterations: int, beta: float, forwards: int
) -> None:
    """One a pack and iteration, and one for the base model where a KL penalty asks for it."""
    learner: Learner = make_learner(num_iterations=num_iterations, beta=beta)
    calls: list[object] = []
    learner.policy.model.base_model.register_forward_hook(lambda *call: calls.append(call))
    learner.update(groups, step=0)
    assert len(calls) == forwards


def test_metrics(make_learner, groups: list[WeightedGroup]) -> None:
    learner: Learner = make_learner(temperature=0.7)
    (one,) = learner._packs(groups)
    logprobs_N, entropy_N = learner.policy.logprobs(one, temperature=0.7)
    metrics = learner.update(groups, step=0)
    difference_N = (logprobs_N - one.sampler_logprobs_N).abs()
    ratio_N = logprobs_N - one.sampler_logprobs_N
    tokens, plain = one.num_input_tokens, sum(p * len(c) + sum(c) for p, c in SHAPES)
    expected = {
        "loss": -(one.advantages_N.mean().item()),
        "grad_norm": metrics["grad_norm"],
        "update_skipped": 0.0,
        "entropy": entropy_N.mean().item(),
        "sampling/sampling_logp_difference/mean": difference_N.mean().item(),
        "sampling/sampling_logp_difference/max": difference_N.max().item(),
        "sampling/kl": (ratio_N.exp() - 1 - ratio_N).mean().item(),
        "learning_rate": 1e-4,
        "packing/packs": 1.0,
        "packing/tokens": tokens,
        "packing/padding_ratio": 0.0,
        "packing/token_ratio": tokens / plain,
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert metrics["grad_norm"] > 0


def test_kl_is_told_where_it_is_paid_for(make_learner, groups: list[WeightedGroup]) -> None:
    learner: Learner = make_learner(beta=0.1)
    (one,) = learner._packs(groups)
    difference_N = learner.policy.logprobs(one, use_adapter=False)[0] - learner.policy.logprobs(one)[0]
    kl = (difference_N.exp() - 1 - difference_N).mean().item()
    metrics = learner.update(groups, step=0)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.1 * kl - one.advantages_N.mean().item(), rel=1e-4)


def test_padding_is_counted(make_learner) -> None:
    learner: Learner = make_learner("mistral")
    metrics = learner.update(random_groups([(5, [4, 2])]), step=0)  # rows of 8 and 6 input tokens
    assert (metrics["packing/tokens"], metrics["packing/padding_ratio"]) == (14.0, 2 / 16)
