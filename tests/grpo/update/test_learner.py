"""The update: optimizer step, what it is a mean over, what skips it, several iterations, going back, and its metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_groups import make_group, random_groups, with_logprobs

from rankup.grpo.algorithm.corrections import gap_metrics, gap_tally
from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import by_completion
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.grpo.update.step_packs import make_packs

SHAPES = [(7, [5, 1, 9, 4]), (3, [3, 6]), (12, [2, 8])]

# The first AdamW step is the sign of the gradient, which noise decides where the gradient is small. With an epsilon far above
# the gradient it is proportional to the gradient instead, and updates can be compared.
PROPORTIONAL = {"adam_epsilon": 1e4, "learning_rate": 1e3}


@pytest.fixture
def make_learner(make_policy) -> Callable[..., Learner]:
    """A learner on a policy with a strong adapter, published; `options` are `GRPOConfig`'s.

    The groups' log-probabilities are made up: by default no weight corrects them and no guard triggers.
    """

    def make(kind: str = "llama", *, rank: int = 16, **options: Any) -> Learner:
        policy: Policy = make_policy(kind, rank=rank)
        policy.write_slots()
        values: dict[str, Any] = {"mode": "none", "veto": 0.0, "guards": {"enabled": False}, **options}
        return Learner(policy, GRPOConfig(**values))

    return make


@pytest.fixture
def groups() -> list[Group]:
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


def moved(policy: Policy, before: list[torch.Tensor]) -> torch.Tensor:
    """All changes of the master weights in one vector."""
    return torch.cat([(p - q).detach().flatten() for p, q in zip(policy.masters, before, strict=True)])


# Updates


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_an_update_makes_good_completions_likelier_and_bad_ones_less_likely(make_learner, kind: str) -> None:
    good, bad = random_groups([(5, [6, 4]), (5, [6, 4])])
    groups = [
        replace(good, advantages=(1.0, 1.0)),
        replace(bad, advantages=(-1.0, -1.0)),
    ]
    learner: Learner = make_learner(kind, learning_rate=1e-3)
    policy = learner.policy
    (one,) = make_packs(learner.policy, groups, 4096)
    before, _ = policy.logprobs(one)
    assert len(before) == 20
    learner.update(groups, step=0)
    policy.write_slots()
    change = policy.logprobs(one)[0] - before
    assert change[:10].sum() > 0.1 and change[10:].sum() < -0.1


def test_updates_move_every_master_and_nothing_of_the_base(make_learner, groups: list[Group]) -> None:
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


def test_the_schedule_sets_the_rate_of_the_step(make_learner, groups: list[Group]) -> None:
    moves = []
    for step in (0, 5):
        learner: Learner = make_learner(**PROPORTIONAL, lr_scheduler_type="linear", max_steps=10)
        before = copies(learner.policy)
        metrics = learner.update(groups, step=step).metrics
        assert metrics["learning_rate"] == 1e3 * (1 - step / 10)
        moves.append(moved(learner.policy, before))
    torch.testing.assert_close(moves[1], 0.5 * moves[0], rtol=0.01, atol=1e-6)


PACKED = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "gspo": {"loss_type": "gspo", "epsilon": 0.2, "epsilon_high": 0.2, "entropy_coef": 0.1},
    "quantile": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1, "mode": "token_truncate", "veto": 1e-4},
}


@pytest.mark.parametrize("objective", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_the_update_of_many_packs_equals_that_of_one(
    make_learner, groups: list[Group], kind: str, objective: dict[str, Any]
) -> None:
    results = []
    for budget in (10_000, 40, 1):
        learner: Learner = make_learner(kind, **PROPORTIONAL, tokens_per_pack=budget, beta=0.1, **objective)
        before = copies(learner.policy)
        metrics = learner.update(groups, step=0).metrics
        results.append((moved(learner.policy, before), metrics))
    (expected, expected_metrics), *others = results
    assert expected.norm() > 1e-3
    for change, metrics in others:
        assert (change - expected).norm() <= 1e-3 * expected.norm()
        for name in ("loss", "grad_norm", "entropy", "kl", "sampling/kl"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name


def test_gradients_are_clipped_to_the_norm(make_learner, groups: list[Group]) -> None:
    norms = []
    for max_grad_norm in (1e6, 0.01):
        learner: Learner = make_learner(**PROPORTIONAL, max_grad_norm=max_grad_norm)
        before = copies(learner.policy)
        metrics = learner.update(groups, step=0).metrics
        assert metrics["grad_norm"] > 0.1, "it is the norm before clipping"
        norms.append((moved(learner.policy, before).norm().item(), metrics["grad_norm"]))
    (free, grad_norm), (clipped, _) = norms
    assert clipped / free == pytest.approx(0.01 / grad_norm, rel=0.02)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [make_group([5, 6], [[], []], advantages=[1.0, -1.0])],
        [make_group([5, 6], [[7, 8], [9]])],  # without variance
        [make_group([5, 6], [[7, 8], [9]], advantages=[1.0, -1.0], truncated=(0, 1))],
    ],
    ids=["no groups", "no tokens", "no advantages", "nothing complete"],
)
def test_nothing_to_train_on_is_no_update(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner(mask_truncated_completions=True)
    before = copies(learner.policy)
    metrics = learner.update(groups, step=0).metrics
    assert {name for name in metrics if not name.startswith("guards/")} == {"learning_rate"}
    assert all(map(torch.equal, before, learner.policy.masters))


@pytest.mark.parametrize("advantage", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_step(make_learner, groups: list[Group], advantage: float) -> None:
    learner: Learner = make_learner(learning_rate=1e-3)
    learner.update(groups, step=0)
    learner.policy.write_slots()
    before = copies(learner.policy)
    state = [{k: v.clone() for k, v in learner.optimizer.state[p].items()} for p in learner.policy.masters]
    broken = replace(groups[0], advantages=(advantage, 1.0, 1.0, 1.0))
    metrics = learner.update([broken, *groups[1:]], step=1).metrics
    assert metrics["update_skipped"] == 1.0 and not math.isfinite(metrics["grad_norm"])
    assert all(map(torch.equal, before, learner.policy.masters))
    for parameter, entries in zip(learner.policy.masters, state, strict=True):
        assert all(torch.equal(learner.optimizer.state[parameter][key], value) for key, value in entries.items())
    # And the next step is as if it had not been.
    assert learner.update(groups, step=2).metrics["update_skipped"] == 0.0
    assert not any(map(torch.equal, before, learner.policy.masters))


# Denominators of the loss


@pytest.fixture
def mixed() -> list[Group]:
    """A group of 10 tokens in 3 completions, one of them empty and one of 4 cut off, and one of 7 in 2 without variance."""
    taught, equal = random_groups([(5, [6, 4, 0]), (3, [5, 2])], truncated=(1,))
    return [replace(taught, advantages=(2.0, -1.0, 0.5)), replace(equal, advantages=(0.0, 0.0))]


# The loss of a first iteration is minus the weighted sum of the advantages: 2 for 6 tokens, -1 for the 4 that are cut off.
@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"loss_type": "dapo"}, -(12 - 4) / 10),
        ({"loss_type": "dapo", "filter_zero_variance": False}, -(12 - 4) / 17),
        ({"loss_type": "dapo", "mask_truncated_completions": True}, -12 / 6),
        # Of both groups the second completion is cut off.
        ({"loss_type": "dapo", "mask_truncated_completions": True, "filter_zero_variance": False}, -12 / 11),
        ({"loss_type": "bnpo"}, -(12 - 4) / 10),
        ({"loss_type": "grpo"}, -(2 - 1) / 2),
        ({"loss_type": "grpo", "filter_zero_variance": False}, -(2 - 1) / 5),
        ({"loss_type": "grpo", "mask_truncated_completions": True}, -2 / 1),
        ({"loss_type": "grpo", "mask_truncated_completions": True, "filter_zero_variance": False}, -2 / 5),
        # The constant counts all completions of all groups.
        ({"loss_type": "dr_grpo"}, -(12 - 4) / (5 * 20)),
        ({"loss_type": "dr_grpo", "filter_zero_variance": False}, -(12 - 4) / (5 * 20)),
        ({"loss_type": "dr_grpo", "mask_truncated_completions": True}, -12 / (5 * 20)),
    ],
)
def test_denominators(make_learner, mixed: list[Group], options: dict[str, Any], loss: float) -> None:
    learner: Learner = make_learner(max_completion_length=20, **options)
    metrics = learner.update(mixed, step=0).metrics
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    masks_truncated = options.get("mask_truncated_completions", False)
    assert metrics["packing/completion_tokens"] == (6 if masks_truncated else 10), "groups without variance cost nothing"


@pytest.mark.parametrize("filtered", [True, False])
def test_a_bonus_acts_on_groups_without_variance(make_learner, mixed: list[Group], filtered: bool) -> None:
    """Their entropy counts, so they are in all means."""
    learner: Learner = make_learner(entropy_coef=0.1, filter_zero_variance=filtered)
    metrics = learner.update(mixed, step=0).metrics
    assert metrics["packing/completion_tokens"] == 17
    assert metrics["loss"] == pytest.approx(-8 / 17 - 0.1 * metrics["entropy"], rel=1e-5)


def test_a_user_supplied_objective(make_policy, mixed: list[Group], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(tokens):\n    return 3 * tokens.advantages + 0 * tokens.logprobs\n")
    (tmp_path / "run.yaml").write_text("algorithm: {loss_type: 'mine.py:loss'}\nguards: {enabled: false}\n")
    learner = Learner(make_policy(), load_config(tmp_path / "run.yaml", ["mode=none", "veto=0"]))
    assert learner.update(mixed, step=0).metrics["loss"] == pytest.approx(3 * 8 / 10)


# Guards


def groups_of_the_policy(learner: Learner, groups: list[Group]) -> list[Group]:
    """The groups as if this policy had sampled them."""
    packs = make_packs(learner.policy, groups, 4096)
    return with_logprobs(groups, by_completion(packs, [learner.policy.logprobs(one)[0] for one in packs]))


def test_a_batch_of_another_policy_is_skipped_and_reported(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner(guards={"enabled": True})
    before = copies(learner.policy)
    update = learner.update(groups, step=0)
    assert update.metrics["update_skipped"] == 1.0 and update.metrics["sampling/kl"] > 0.1
    assert all(map(torch.equal, before, learner.policy.masters))
    assert any("skipped the update" in note for note in update.notes)


def test_the_last_healthy_policy_is_restored_bit_exactly(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner(guards={"enabled": True}, learning_rate=1e-3)
    assert learner.snapshots.by_kind["step"].step is None
    sampled = groups_of_the_policy(learner, groups)
    before = copies(learner.policy)
    update = learner.update(sampled, step=0, observed={"reward": 0.5})
    assert update.metrics["update_skipped"] == 0.0 and update.notes == ()
    once = copies(learner.policy)
    learner.update(sampled, step=1)
    assert learner.guards.restore("step") == 0, "the policy of the first step, before its update"
    assert all(map(torch.equal, before, learner.policy.masters))
    learner.policy.write_slots()
    learner.update(sampled, step=2)
    assert all(map(torch.equal, once, learner.policy.masters)), "Adam's moments went back too"


def test_a_restore_of_8_bit_state_is_bit_exact(make_learner, groups: list[Group]) -> None:
    guards = {"enabled": True, "snapshot_steps": 3}
    learner: Learner = make_learner(rank=64, guards=guards, learning_rate=1e-4, optimizer="adamw_8bit")
    outcomes: dict[int, list[torch.Tensor]] = {}
    for step in (0, 1, 2, 3, 4, 3, 4):
        if step == 3 and step in outcomes:
            assert learner.guards.restore("step") == 3, "the policy of the fourth step, before its update"
            learner.policy.write_slots()
        update = learner.update(groups_of_the_policy(learner, groups), step=step, observed={"reward": 0.5})
        assert update.metrics["update_skipped"] == 0.0
        learner.policy.write_slots()
        assert step not in outcomes or all(map(torch.equal, outcomes[step], learner.policy.masters))
        outcomes[step] = copies(learner.policy)
    states = [learner.optimizer.state[master]["state1"] for master in learner.policy.masters]
    assert all(state.dtype == torch.uint8 and state.any() for state in states)


# Iterations


def test_every_iteration_uses_the_weights_of_the_previous_one(make_learner, groups: list[Group]) -> None:
    """Two iterations: the second one's forward uses the master weights that the first one's step wrote."""
    learner: Learner = make_learner(**PROPORTIONAL, num_iterations=2)
    policy = learner.policy
    first: Learner = make_learner(**PROPORTIONAL)
    first.update(groups, step=0)
    metrics = learner.update(groups, step=0).metrics
    for layer, other in zip(policy.layers.values(), first.policy.layers.values(), strict=True):
        torch.testing.assert_close(layer.slot.a[:16], other.master_a.detach(), rtol=1e-4, atol=1e-6)
        b = layer.scaling["default"] * other.master_b.detach()
        torch.testing.assert_close(layer.slot.b[:, :16], b, rtol=1e-4, atol=1e-6)
        assert not torch.equal(layer.slot.a[:16], layer.master_a), "the last step is published by whoever called"
    assert metrics["update_skipped"] == 0.0


def test_the_ratio_is_to_the_policy_that_the_step_began_with(make_learner, groups: list[Group]) -> None:
    """A large first step pushes ratios beyond the clip; the second iteration's gradient is then held back."""
    norms = []
    for epsilon, epsilon_high in [(0.01, 0.01), (1.0, 100.0)]:
        learner: Learner = make_learner(
            learning_rate=3e-3, num_iterations=2, epsilon=epsilon, epsilon_high=epsilon_high
        )
        norms.append(learner.update(groups, step=0).metrics["grad_norm"])
    assert norms[0] < 0.7 * norms[1]


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo"])
def test_clip_ratios_of_a_later_iteration(make_learner, groups: list[Group], loss_type: str) -> None:
    """They are measured where the second iteration begins: after one step."""
    options = {"loss_type": loss_type, "epsilon": 0.05, "epsilon_high": 1.05 if loss_type == "cispo" else 0.05}
    first: Learner = make_learner(learning_rate=3e-3, **options)
    (one,) = make_packs(first.policy, groups, 4096)
    old_N, _ = first.policy.logprobs(one)
    assert not [name for name in first.update(groups, step=0).metrics if name.startswith("clip_ratio")], "the ratio is 1"
    first.policy.write_slots()
    log_ratio_N = first.policy.logprobs(one)[0] - old_N
    if loss_type == "gspo":
        log_ratio_N = torch.cat([part.mean().expand(len(part)) for part in log_ratio_N.split(one.lengths_S.tolist())])
    low = ((log_ratio_N.exp() < 0.95) & (one.advantages_N < 0)).float().mean().item() if loss_type != "cispo" else 0.0
    high = ((log_ratio_N.exp() > 1.05) & (one.advantages_N > 0)).float().mean().item()
    learner: Learner = make_learner(learning_rate=3e-3, num_iterations=2, **options)
    metrics = learner.update(groups, step=0).metrics
    assert high > 0 and metrics["clip_ratio/high_mean"] == pytest.approx(high)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(low)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(low + high)
    assert all(parameter.grad is None for parameter in learner.policy.masters), "gradients do not wait in memory"


# Metrics


@pytest.mark.parametrize(("num_iterations", "beta", "forwards"), [(1, 0.0, 1), (1, 0.1, 2), (3, 0.1, 4)])
@pytest.mark.parametrize("quantile", [1.0, 0.2])
def test_no_forward_that_is_not_needed(
    make_learner, groups: list[Group], num_iterations: int, beta: float, forwards: int, quantile: float
) -> None:
    """One a pack and iteration, one for the base model where a KL penalty asks for it, one to find the entropy bound."""
    learner: Learner = make_learner(num_iterations=num_iterations, beta=beta, top_entropy_quantile=quantile)
    calls: list[object] = []
    learner.policy.model.base_model.register_forward_hook(lambda *call: calls.append(call))
    learner.update(groups, step=0)
    assert len(calls) == forwards + (quantile < 1)


def test_metrics(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner(temperature=0.7)
    (one,) = make_packs(learner.policy, groups, 4096)
    logprobs_N, entropy_N = learner.policy.logprobs(one, temperature=0.7)
    metrics = learner.update(groups, step=0).metrics
    tokens, plain = one.num_input_tokens, sum(p * len(c) + sum(c) for p, c in SHAPES)
    expected = {
        "loss": -(one.advantages_N.mean().item()),
        "grad_norm": metrics["grad_norm"],
        "updates": 1.0,
        "update_skipped": 0.0,
        "sampling/left_out_ratio": 0.0,
        "entropy": entropy_N.mean().item(),
        **gap_metrics(gap_tally(logprobs_N, one.sampler_logprobs_N, torch.ones_like(logprobs_N))),
        "learning_rate": 1e-4,
        "packing/packs": 1.0,
        "packing/tokens": tokens,
        "packing/completion_tokens": len(logprobs_N),
        "packing/padding_ratio": 0.0,
        "packing/token_ratio": tokens / plain,
        "packing/tokens_per_pack": 4096.0,
        **learner.guards.metrics(),
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert metrics["grad_norm"] > 0


def test_kl_is_reported_only_if_it_is_computed_anyway(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner(beta=0.1)
    (one,) = make_packs(learner.policy, groups, 4096)
    difference_N = learner.policy.logprobs(one, use_adapter=False)[0] - learner.policy.logprobs(one)[0]
    kl = (difference_N.exp() - 1 - difference_N).mean().item()
    metrics = learner.update(groups, step=0).metrics
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.1 * kl - one.advantages_N.mean().item(), rel=1e-4)
