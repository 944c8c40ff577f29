"""Learning rates by role, rank and scale, the schedule, and what rescaling the rate promises: the same run at another scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.config import GRPOConfig, OptimConfig
from rankup.grpo.lora_layers import ADAPTER
from rankup.grpo.losses import Counts
from rankup.grpo.objective import Objective, StepConstants
from rankup.grpo.optimizer import learning_rate, make_optimizer, set_learning_rate
from rankup.grpo.packing import pack
from rankup.grpo.policy import Policy

MakePolicy = Callable[..., Policy]

# ------------------------------------------------------------------------------------------------------- schedule


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


# --------------------------------------------------------------------------------------------------------- groups


def rate_by_master(policy: Policy, optim: OptimConfig, *, scheduled: float | None = None) -> dict[tuple[str, str], float]:
    """(layer, "a" or "b") -> learning rate of the next update."""
    optimizer = make_optimizer(policy.master_roles, optim)
    if scheduled is not None:
        set_learning_rate(optimizer, scheduled)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(policy.masters), "each master once"
    return {
        (name.rpartition(".")[2], part): by_id[id(master)]
        for name, layer in policy.layers.items()
        for part, master in (("a", layer.master_a), ("b", layer.master_b))
    }


def test_one_rate_for_all_by_default(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert set(rate_by_master(policy, OptimConfig(), scheduled=3e-5).values()) == {3e-5}
    assert len(make_optimizer(policy.master_roles, OptimConfig()).param_groups) == 1


def test_the_settings_are_those_of_the_configuration(make_policy: MakePolicy) -> None:
    optim = OptimConfig(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.1)
    (group,) = make_optimizer(make_policy().master_roles, optim).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.1)


def test_lora_plus_multiplies_the_rate_of_b(make_policy: MakePolicy) -> None:
    optim = OptimConfig(learning_rate=1e-4, lora_plus_ratio=8)
    for (_, part), rate in rate_by_master(make_policy(), optim, scheduled=2e-5).items():
        assert rate == pytest.approx(1.6e-4 if part == "b" else 2e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": 1e-4}, 5e-5),
        ({"learning_rate": 1e-5}, 1e-5),  # never above the others
        ({"learning_rate": 1e-4, "embedding_learning_rate": 3e-4}, 3e-4),
    ],
)
def test_the_embedding_has_its_own_rate(make_policy: MakePolicy, options: dict[str, float], expected: float) -> None:
    """On the same schedule, and neither LoRA+ nor the scale touches it."""
    policy = make_policy(targets=["embed_tokens", "q_proj"])
    optim = OptimConfig(**options, lora_plus_ratio=4, rescale_learning_rate=True)  # type: ignore[arg-type]
    rates = rate_by_master(policy, optim, scheduled=options["learning_rate"] / 2)
    assert [rates["embed_tokens", part] for part in "ab"] == pytest.approx([expected / 2] * 2)
    assert rates["q_proj", "a"] == options["learning_rate"] / 2


def test_rescaling_goes_by_each_layer_s_own_scale_and_rank(make_policy: MakePolicy) -> None:
    policy = make_policy(
        rank=16, alpha=32, alpha_pattern={"q_proj": 128, "up_proj": 8}, rank_pattern={"k_proj": 4, "up_proj": 8}
    )
    rates = rate_by_master(policy, OptimConfig(learning_rate=1.0, rescale_learning_rate=True))
    assert {part: rate for (name, part), rate in rates.items() if name == "q_proj"} == {"a": 1.0, "b": 0.25}
    assert rates["up_proj", "b"] == 4.0, "32 / 8, whatever the rank"
    assert rates["k_proj", "b"] == rates["v_proj", "b"] == 1.0, "alpha / rank: the rank cancels"


def test_rescaling_knows_rslora(make_policy: MakePolicy) -> None:
    policy = make_policy(rank=16, alpha=32, use_rslora=True, rank_pattern={"k_proj": 4})
    rates = rate_by_master(policy, OptimConfig(learning_rate=1.0, rescale_learning_rate=True))
    assert (rates["v_proj", "b"], rates["k_proj", "b"]) == (0.25, 0.5)  # 1 / sqrt(rank)


# ---------------------------------------------------------------------------------------------------- equivalence


def trained(make_policy: MakePolicy, *, rescale: bool = False, **lora: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """After five steps, by layer: A, and what the steps have added to `scale * B @ A`."""
    policy = make_policy(strength=0.0, rank=16, **lora)  # B = 0, as adapters begin
    config = GRPOConfig(loss_type="dapo", mode="none", veto=0.0)
    optim = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-30, rescale_learning_rate=rescale)
    optimizer = make_optimizer(policy.master_roles, optim)
    (one,) = pack(random_groups([(5, [6, 4, 9]), (3, [7, 5])]), tokens_per_pack=1000)
    tokens = len(one.targets_N)
    counts = Counts(sequences=5, tokens=tokens, local_tokens=tokens, max_completion_length=10)
    constants = StepConstants(counts=counts, entropy_tokens=tokens)
    for _ in range(5):
        policy.write_slots()
        loss = Objective(config).of(one, constants, old_logprobs_N=None, base_logprobs_N=None)
        policy.backward(one, loss.token_loss, visits=loss.visits)
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (layer.master_a.detach(), layer.scaling[ADAPTER] * (layer.master_b @ layer.master_a).detach())
        for name, layer in policy.layers.items()
    }


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Relative, over layers, of A and of the products."""
    return max(
        ((x - y).norm() / x.norm()).item() for name in one for x, y in zip(one[name], other[name], strict=True)
    )


# Powers of two as ranks and alphas: scaling gradients by them loses no digit, so Adam divides the same numbers.
OTHER_SCALES = {
    "alpha 256": {"alpha": 256},
    "alpha 4": {"alpha": 4},
    "rsLoRA": {"alpha": 32, "use_rslora": True},
    "rsLoRA, alpha 128": {"alpha": 128, "use_rslora": True},
    "one layer's alpha": {"alpha": 32, "alpha_pattern": {"q_proj": 512, "layers.1.mlp.up_proj": 2}},
}


@pytest.mark.parametrize("lora", OTHER_SCALES.values(), ids=OTHER_SCALES)
def test_a_rescaled_rate_is_the_same_run_at_another_scale(make_policy: MakePolicy, lora: dict[str, Any]) -> None:
    reference = trained(make_policy, alpha=32)
    assert all(product.norm() > 0.1 for _, product in reference.values()), "it must have learnt something"
    assert largest_difference(reference, trained(make_policy, rescale=True, **lora)) < 1e-5
    assert largest_difference(reference, trained(make_policy, **lora)) > 0.1, "without rescaling it is another run"
