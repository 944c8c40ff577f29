"""Targets as a regular expression, end to end: vLLM wraps all layers of a targeted name; those without an adapter stay zero."""

from __future__ import annotations

import pytest
import torch

from rankup.grpo.config import GRPOConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import prove_slots, trainer_logprobs
from rankup.grpo.update.resolve import engine_settings

pytestmark = pytest.mark.engine

SEQUENCES = [[5, 9, 14, 3, 77, 60, 31, 8], [7, 21, 40, 2, 90, 55]]
RANKS = {
    "model.layers.0.self_attn.q_proj": 16,
    "model.layers.1.mlp.gate_proj": 16,
    "model.layers.1.mlp.up_proj": 4,
    "model.layers.1.mlp.down_proj": 96,
}


@pytest.fixture
def config(tiny_model_path) -> GRPOConfig:
    return GRPOConfig(
        model={"name": str(tiny_model_path("llama")), "dtype": "float32"},
        lora={
            "targets": r".*layers\.0\.self_attn\.q_proj|.*layers\.1\.mlp\.\w+_proj",
            "rank": 16,
            "rank_pattern": {"up_proj": 4, r"1\.mlp\.down.*": 96},
        },
        rollout={"max_prompt_length": 64, "max_completion_length": 64, "kv_cache_gib": 1 / 16, "max_num_seqs": 8},
    )


def test_an_expression_adapts_only_the_layers_that_it_matches(engine_shelf, config: GRPOConfig):
    settings = engine_settings(config, config.model.name)
    assert settings.target_modules == ("q_proj", "gate_proj", "up_proj", "down_proj")
    assert settings.max_rank == 128
    engine = engine_shelf.get(settings)
    policy = Policy(config.model.name, lora=config.lora, dtype="float32", seed=0)
    assert {name: layer.r["default"] for name, layer in policy.layers.items()} == RANKS

    idle = [slot for name, slot in engine.slots.items() if name not in RANKS]
    wrapped = {name.rpartition(".")[2] for name in engine.slots}
    assert wrapped == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}, "packed layers are wrapped as one"
    policy.attach(engine.slots)
    proofs = prove_slots(policy, engine, each=True)
    assert len(proofs) == 3 + len(RANKS)
    assert all(proof.gap <= 0.01 * proof.effect for proof in proofs), max(proofs, key=lambda p: p.gap / p.effect)

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in policy.layers.values():
            b = layer.master_b
            b.copy_(torch.randn(b.shape, generator=generator) * 0.3 / layer.scaling["default"] / b.shape[1] ** 0.5)
    engine.publish(policy.write_slots)
    for got, expected in zip(engine.prompt_logprobs(SEQUENCES), trainer_logprobs(policy, SEQUENCES), strict=True):
        assert got == pytest.approx(expected, abs=3e-4)
    assert not any(slot.a.any() or slot.b.any() for slot in idle)
    for name, rank in RANKS.items():
        slot = engine.slots[name]
        assert slot.a[:rank].any() and not slot.a[rank:].any() and not slot.b[:, rank:].any()
