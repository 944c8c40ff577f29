"""vLLM's GPU model runner with our slots, base weights and start-up proof, without and with CUDA graphs, which are replayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.config import GRPOConfig, LoraConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import SAMPLING, prove_slots, trainer_logprobs
from rankup.grpo.update.learner import Learner
from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.engine import RolloutEngine
from rankup.rollout.slots import find_slots

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
SEQUENCES = [[5, 9, 14, 3, 77, 60, 31, 8], [7, 21, 40, 2, 90, 55]]
SHORT = SamplingConfig(num_generations=1, max_completion_length=4)


@pytest.fixture(params=["eager", "graphs"], scope="module")
def rollout(request: pytest.FixtureRequest) -> RolloutConfig:
    """The tests of one engine follow each other."""
    return RolloutConfig(max_prompt_length=64, max_completion_length=64, enforce_eager=request.param == "eager")


@pytest.fixture
def engine(make_engine, rollout: RolloutConfig) -> RolloutEngine:
    return make_engine("llama", rollout=rollout, dtype="bfloat16", max_num_seqs=8)


@pytest.fixture
def policy(engine: RolloutEngine) -> Iterator[Policy]:
    """A policy on the engine's slots and weights, with a strong random adapter that is published."""
    model, lora = engine.settings.model, LoraConfig(rank=16, alpha=16)
    made = Policy(model, lora=lora, device="cuda", shared=engine.base_weights(), slots=engine.slots)
    randomise(made)
    engine.publish(made.write_slots)
    yield made
    for slot in engine.slots.values():
        slot.b.zero_()


@torch.no_grad()
def randomise(policy: Policy, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in policy.layers.values():
        layer.master_b.copy_(torch.randn(layer.master_b.shape, generator=generator) * 0.3 / layer.rank**0.5)


def sampled(engine: RolloutEngine, **options: Any) -> list[list[int]]:
    groups = engine.rollout(PROMPTS, SHORT, seeds=[1, 2], **options)
    return [list(c.token_ids) for group in sorted(groups, key=lambda g: g.index) for c in group.completions]


def largest_gap(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for row, other_row in zip(one, other, strict=True) for a, b in zip(row, other_row, strict=True))


def test_trainer_and_engine_agree(engine: RolloutEngine, policy: Policy) -> None:
    proofs = prove_slots(policy, engine, episodes=True)
    assert [proof.what for proof in proofs] == ["all projections", *SAMPLING]
    assert all(proof.gap < 0.1 * proof.effect for proof in proofs), proofs


def test_all_base_weights_are_shared(policy: Policy) -> None:
    assert policy.base.unshared == () and policy.base.shared_bytes > 0
    assert policy.base.written(thoroughly=True) == []


def test_the_base_model_is_sampled_without_the_adapter(engine: RolloutEngine, policy: Policy) -> None:
    with_adapter, without = sampled(engine), sampled(engine, use_adapter=False)
    assert with_adapter != without
    of_engine = engine.prompt_logprobs(SEQUENCES, use_adapter=False)
    assert largest_gap(of_engine, trainer_logprobs(policy, SEQUENCES, use_adapter=False)) < 0.2


def test_the_same_policy_and_seeds_give_the_same_tokens(engine: RolloutEngine, policy: Policy) -> None:
    first = sampled(engine)
    randomise(policy, seed=2)
    engine.publish(policy.write_slots)
    assert sampled(engine) != first
    randomise(policy)
    engine.publish(policy.write_slots)
    assert sampled(engine) == first


def test_an_update_on_shared_weights_reaches_the_sampler(engine: RolloutEngine, policy: Policy) -> None:
    learner = Learner(policy, GRPOConfig(learning_rate=0.1, mode="none", veto=0.0, guards={"enabled": False}))
    before = engine.prompt_logprobs(SEQUENCES)
    learner.update(random_groups([(5, [3, 5, 4, 8])]), step=0)
    engine.publish(policy.write_slots)
    after = engine.prompt_logprobs(SEQUENCES)
    assert largest_gap(after, before) > 0.5
    assert largest_gap(after, trainer_logprobs(policy, SEQUENCES)) < 0.2
    assert policy.base.written(thoroughly=True) == []


@pytest.fixture
def moved_buffers(engine: RolloutEngine, policy: Policy) -> Iterator[None]:
    """vLLM's layers have other buffers than those that its graphs were captured with, and the policy's slots are in them."""
    moved = engine._apply_model(move_buffers)
    engine.slots = engine._apply_model(lambda model: find_slots(model, engine.settings.model))
    policy.attach(engine.slots)
    yield
    for tensor, before in moved:
        tensor.data = before
    engine.slots = engine._apply_model(lambda model: find_slots(model, engine.settings.model))


def move_buffers(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers, and what they held before."""
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "lora_a_stacked", None), tuple)]
    buffers = [buffer for layer in layers for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    moved = [(buffer, buffer.data) for buffer in buffers]
    for buffer in buffers:
        buffer.data = buffer.data.clone()
    return moved


@pytest.mark.usefixtures("moved_buffers")
def test_graphs_that_read_old_buffers_fail_the_proof(engine: RolloutEngine, policy: Policy, rollout: RolloutConfig) -> None:
    if rollout.enforce_eager:  # nothing but graphs remembers where the buffers were
        prove_slots(policy, engine)
        return
    with pytest.raises(RuntimeError, match="the engine does not sample from the policy that is trained"):
        prove_slots(policy, engine)
