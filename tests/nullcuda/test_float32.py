"""`model.dtype: float32` on CUDA: dense products in the engine, attention without flash kernels in the trainer."""

from __future__ import annotations

import gc

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.config import GRPOConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import prove_slots
from rankup.grpo.update.learner import Learner
from rankup.rollout.config import RolloutConfig
from rankup.rollout.engine import EngineSettings, RolloutEngine

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLLOUT = RolloutConfig(max_prompt_length=64, max_completion_length=64, gpu_memory_utilization=0.45, enforce_eager=True)
CONFIG = GRPOConfig(rank=16, alpha=32, learning_rate=1e-2, max_steps=5, dtype="float32")


def test_float32_is_proven_and_trained(tiny_model_path, no_other_engine):
    model = str(tiny_model_path("llama"))
    settings = EngineSettings(
        model=model, rollout=ROLLOUT, target_modules=TARGETS, max_rank=16, max_num_seqs=8, dtype="float32"
    )
    engine = RolloutEngine(settings)
    policy = Policy(model, lora=CONFIG.lora, device="cuda", dtype="float32", shared=engine.base_weights())
    policy.attach(engine.slots)
    proofs = prove_slots(policy, engine)
    assert proofs and all(proof.gap < 1e-3 * proof.effect for proof in proofs)
    groups = random_groups([(5, [3, 5, 4, 8]), (7, [2, 6])])
    gradients = Learner(policy, CONFIG).backward(groups)
    on_cpu = Policy(model, lora=CONFIG.lora, device="cpu", dtype="float32")
    with torch.no_grad():
        for master, other in zip(on_cpu.masters, policy.masters, strict=True):
            master.copy_(other)
    on_cpu.write_slots()
    expected = Learner(on_cpu, CONFIG).backward(groups)
    assert gradients.metrics()["grad_norm"] == pytest.approx(expected.metrics()["grad_norm"], rel=1e-4)
    for master, other in zip(policy.masters, on_cpu.masters, strict=True):
        assert master.grad is not None and other.grad is not None
        assert (master.grad.cpu() - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-8
    del policy
    gc.collect()
    engine.close()
