"""Mixtures of experts: flips between sampler and trainer, and replaying the sampler's choice, against plain routers in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_family
from family_checks import SHAPES, gradient_error, own_pass, stock_pass
from routing import EXPERTS, ROUTERS, own_experts, plain_routers, with_experts
from sample_groups import random_groups, with_given

from rankup.grpo.config import GRPOConfig, LoraConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import pack, pad
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner

pytestmark = pytest.mark.slow

Of = Callable[..., tuple[Policy, Path]]


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory) -> Of:
    """A function from a family to a policy that replays, on a tiny model with a strong adapter, and the model's folder."""
    made: dict[tuple[str, bool], tuple[Policy, Path]] = {}

    def get(family: str, *, gradient_checkpointing: bool = False) -> tuple[Policy, Path]:
        key = family, gradient_checkpointing
        if key not in made:
            folder = make_family(tmp_path_factory.mktemp(family) / "model", family)
            lora = LoraConfig(rank=8, alpha=8)
            policy = Policy(
                str(folder), lora=lora, dtype="float32", experts="replay", gradient_checkpointing=gradient_checkpointing
            )
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for layer in policy.layers.values():
                    layer.master_b.copy_(torch.randn(layer.master_b.shape, generator=generator) * 0.05)
            policy.write_slots()
            made[key] = policy, folder
        policy = made[key][0]
        assert policy.routers is not None
        policy.routers.replay, policy.shares_prompts = True, policy.plain_reason is None
        policy.routers.take_flips()
        return made[key]

    return get


def share(policy: Policy) -> float:
    """The share of flips of what was computed since the last call."""
    assert policy.routers is not None
    flips = policy.routers.take_flips()
    assert flips.compared > 0
    return flips.flipped / flips.compared


@pytest.mark.parametrize("shares_prompts", [True, False])
@pytest.mark.parametrize("family", ROUTERS)
def test_replaying_its_own_choice_changes_nothing(policy_of: Of, family: str, shares_prompts: bool) -> None:
    policy, _ = policy_of(family)
    policy.shares_prompts = shares_prompts
    assert policy.routers is not None
    groups = random_groups(SHAPES)
    plain = own_pass(policy, groups)
    assert policy.routers.take_flips().compared == 0, "nothing is known of these groups"
    of_itself = own_experts(policy, groups)
    replayed = own_pass(policy, of_itself)
    assert share(policy) == 0.0
    assert replayed.loss == plain.loss
    assert all(torch.equal(replayed.gradients[key], gradient) for key, gradient in plain.gradients.items())
    policy.routers.replay = False
    compared = own_pass(policy, of_itself)
    assert share(policy) == 0.0 and compared.loss == plain.loss


@pytest.mark.parametrize("shares_prompts", [True, False])
@pytest.mark.parametrize("family", ROUTERS)
def test_other_choices_give_the_gradients_of_plain_routers_with_these_experts(
    policy_of: Of, tmp_path: Path, family: str, shares_prompts: bool
) -> None:
    policy, folder = policy_of(family)
    policy.shares_prompts = shares_prompts
    policy.save_adapter(tmp_path / "adapter")
    groups = with_experts(random_groups(SHAPES))
    own = own_pass(policy, groups)
    assert 0.3 < share(policy) < 1.0, "most of these choices are not the model's own"
    assert policy.routers is not None
    with plain_routers(family, groups, policy.routers.layers):
        oracle = stock_pass(folder, tmp_path / "adapter", groups, dtype=torch.float64)
    assert max(float((own.logprobs[key] - of).abs().max()) for key, of in oracle.logprobs.items()) < 1e-4
    assert gradient_error(own, oracle) < 2e-5
    unlike = own_pass(policy, random_groups(SHAPES))
    assert gradient_error(unlike, oracle) > 1e-2, "these experts make a difference"


@pytest.mark.parametrize("family", ROUTERS)
def test_checkpointed_layers_replay_too_and_count_once(policy_of: Of, family: str) -> None:
    groups = with_experts(random_groups(SHAPES))
    policy, _ = policy_of(family)
    plain = own_pass(policy, groups)
    assert policy.routers is not None
    counted = policy.routers.take_flips()
    checkpointing, _ = policy_of(family, gradient_checkpointing=True)
    assert checkpointing.routers is not None
    recomputed = own_pass(checkpointing, groups)
    assert checkpointing.routers.take_flips() == counted
    assert gradient_error(recomputed, plain) < 1e-5


@pytest.mark.parametrize("family", ROUTERS)
def test_flips_are_the_share_of_changed_choices(policy_of: Of, family: str) -> None:
    policy, _ = policy_of(family)
    assert policy.routers is not None
    policy.routers.replay, policy.shares_prompts = False, False
    (group,) = own_experts(policy, random_groups([(6, [9, 5])]))
    layers, changed = policy.routers.layers, 0

    def with_changes(experts: np.ndarray, tokens: list[int]) -> np.ndarray:
        nonlocal changed
        others = experts[:, :, ::-1].copy()  # another order is the same choice
        for token in tokens:
            for layer in layers:
                left = sorted({*range(EXPERTS)} - {*others[token, layer].tolist()})
                others[token, layer, 0] = left[0]
                changed += 1
        return others

    first, second = group.completions
    assert first.routed_experts is not None and second.routed_experts is not None
    completions = (
        dataclasses.replace(first, routed_experts=with_changes(first.routed_experts, [0, 7, 8])),
        dataclasses.replace(second, routed_experts=with_changes(second.routed_experts, [9])),
    )
    own_pass(policy, [dataclasses.replace(group, completions=completions)])
    tokens = (6 + 9 - 1) + (6 + 5 - 1)
    assert policy.routers.take_flips() == (changed, tokens * len(layers)) and changed == 4 * len(layers)


def test_given_tokens_at_the_end_of_an_episode_need_no_experts(policy_of: Of) -> None:
    """The experts of an engine end before its last sampled token."""
    policy, _ = policy_of("qwen3-moe")
    groups = with_given(with_experts(random_groups(SHAPES)), seed=3)
    cut = [
        dataclasses.replace(
            group,
            completions=tuple(
                dataclasses.replace(
                    one, routed_experts=one.routed_experts[: len(group.prompt.token_ids) + one.spans[-1][1] - 1]
                )
                if one.spans and one.routed_experts is not None
                else one
                for one in group.completions
            ),
        )
        for group in groups
    ]
    assert own_pass(policy, cut).loss == own_pass(policy, groups).loss


@pytest.mark.parametrize("layout", [pack, lambda groups, **budget: pad(groups, pad_token_id=0, **budget)])
def test_packs_hold_the_experts_of_each_token_and_nothing_of_padding(layout: Callable[..., list]) -> None:
    groups = with_experts(random_groups([(4, [3, 6]), (2, [5])]))
    for one in layout(groups, tokens_per_pack=14):
        flat = one.input_ids.flatten()
        assert one.routed_experts.shape == (len(flat), 2, 2) and one.routed_experts.dtype == torch.int16
        is_padding = (one.routed_experts == -1).flatten(1).all(1)
        expected = torch.zeros(len(flat), dtype=torch.bool) if one.attention_mask is None else one.attention_mask.flatten() == 0
        assert torch.equal(is_padding, expected)
        rows = [row.tolist() for row in one.routed_experts[~is_padding]]
        known = [c.routed_experts for g in groups for c in g.completions if c.routed_experts is not None]
        assert all(row in np.concatenate(known).tolist() for row in rows)


def without_some(groups: list[Group]) -> list[Group]:
    (first, *others), *rest = [group.completions for group in groups]
    completions = [(dataclasses.replace(first, routed_experts=None), *others), *rest]
    return [dataclasses.replace(group, completions=some) for group, some in zip(groups, completions, strict=True)]


def test_completions_without_experts_are_not_compared_and_cannot_be_replayed(policy_of: Of) -> None:
    policy, _ = policy_of("qwen3-moe")
    assert policy.routers is not None
    learner = Learner(policy, GRPOConfig(mode="none", veto=0.0, guards={"enabled": False}))  # type: ignore[arg-type]
    groups = with_experts(random_groups(SHAPES))
    metrics = learner.backward(groups).metrics()
    assert 0.3 < metrics["sampling/router_flips"] < 1.0
    with pytest.raises(ValueError, match=r"rollout\.routed_experts=replay: completions without the experts that vLLM chose"):
        learner.backward(without_some(groups))
    policy.routers.replay = False
    assert "sampling/router_flips" in learner.backward(without_some(groups)).metrics()
    assert "sampling/router_flips" not in learner.backward(random_groups(SHAPES)).metrics()


def test_a_model_without_known_routers_is_refused(tiny_model_path: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"rollout\.routed_experts: LlamaForCausalLM has no routers"):
        Policy(str(tiny_model_path("llama")), lora=LoraConfig(rank=4), dtype="float32", experts="compare")
