"""Sampling and training in float16: the same policy in both engines, and models that leave its range are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.base_model import load_base
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import prove_slots, trainer_logprobs
from rankup.rollout.config import SamplingConfig
from rankup.rollout.engine_errors import NOT_FINITE
from rankup.rollout.torch_engine import TorchEngine
from rankup.rollout.types import EngineError

PROMPTS = [[5, 9, 14, 3], [7, 21, 40], [11, 12, 13, 14, 15]]
SAMPLING = SamplingConfig(num_generations=4, max_completion_length=12)
UP, DOWN = (f"model.layers.1.mlp.{name}.weight" for name in ("up_proj", "down_proj"))


def policy_on(path: Path, **options: Any) -> Policy:
    return Policy(str(path), lora=LoraConfig(rank=16, alpha=8), dtype="float16", **options)


@pytest.fixture
def changed_model(tiny_model_path, tmp_path: Path):
    """A function that makes a copy of the tiny model with some weights multiplied, in bf16 as most models are published."""

    def change(factors: dict[str, float], kind: str = "llama") -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model_path(kind), folder)
        weights = load_file(folder / "model.safetensors")
        for name, factor in factors.items():
            weights[name] = weights[name].bfloat16().float() * factor
        save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


# A policy


@pytest.mark.slow
@pytest.mark.parametrize("lora_path", ["dense", "punica"])
def test_vllm_samples_from_the_trained_policy(make_engine, tiny_model_path, lora_path: str) -> None:
    """Start-up proof of every projection, episodes too, and the log-probabilities of what is sampled."""
    engine = make_engine(dtype="float16", lora_path=lora_path)
    assert {slot.a.dtype for slot in engine.slots.values()} == {torch.float16}
    policy = policy_on(tiny_model_path("llama"), slots=engine.slots, shared=engine.base_weights())
    assert policy.base.shared_bytes > 0
    prove_slots(policy, engine, each=True, episodes=True)
    assert gap_of(policy, engine) < 5e-3


def test_the_torch_engine_samples_from_the_trained_policy_with_a_smaller_gap_than_in_bf16(tiny_model_path) -> None:
    path, gaps = str(tiny_model_path("llama")), {}
    for dtype in ("bfloat16", "float16"):
        policy = Policy(path, lora=LoraConfig(rank=16, alpha=8), dtype=dtype)
        engine = TorchEngine(policy, path, max_num_seqs=32, max_model_length=64)
        prove_slots(policy, engine, each=True, episodes=True)
        gaps[dtype] = gap_of(policy, engine)
    assert 0 < gaps["float16"] < 0.3 * gaps["bfloat16"], gaps


def gap_of(policy: Policy, engine: Any) -> float:
    """Mean absolute difference of the engine's and the trainer's log-probabilities of a strong adapter's completions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.master_b.copy_(0.05 * torch.randn(layer.master_b.shape, generator=generator))
    engine.publish(policy.write_slots)
    gaps = []
    for group in engine.rollout(PROMPTS, SAMPLING, seeds=range(3)):
        for one in group.completions:
            row = trainer_logprobs(policy, [[*group.prompt_token_ids, *one.token_ids]])[0]
            gaps += [abs(a - b) for a, b in zip(one.logprobs, row[len(group.prompt_token_ids) - 1 :], strict=True)]
    return sum(gaps) / len(gaps)


def test_scaled_b_is_rounded_once_into_the_slots(tiny_model_path) -> None:
    """Also where float16 has few digits left: rank 128 of alpha 32 scales B by a quarter."""
    policy = Policy(str(tiny_model_path("llama")), lora=LoraConfig(rank=128, alpha=32), dtype="float16")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.master_b.copy_(1e-5 * torch.randn(layer.master_b.shape, generator=generator))
    policy.write_slots()
    for layer in policy.layers.values():
        b, exact = layer.adapter.b, 0.25 * layer.master_b.detach()
        assert torch.equal(b, exact.half()) and (b.float() - exact).norm() < 0.02 * exact.norm()


# Models that leave its range


@pytest.mark.parametrize("load_in", [None, "nf4"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_weight_beyond_the_range_is_refused(changed_model, load_in: Any, is_shared: bool) -> None:
    path = changed_model({UP: 1e6}, "llama64")
    shared = {UP: load_file(path / "model.safetensors")[UP].half()} if is_shared else None
    with pytest.raises(ValueError, match=r"float16: model.layers.1.mlp.up_proj.\w+ has a value beyond float16's range"):
        load_base(str(path), dtype=torch.float16, load_in=load_in, shared=shared)
    load_base(str(path), dtype=torch.bfloat16, load_in=load_in)


def test_activations_beyond_the_range_stop_the_proof_and_the_sampler(changed_model) -> None:
    path = changed_model({UP: 1e4, DOWN: 1e4})
    policy = policy_on(path)
    engine = TorchEngine(policy, str(path), max_num_seqs=32, max_model_length=64)
    with pytest.raises(EngineError, match=r"in model.dtype=float16, whose range ends at 65504, set bfloat16 or float32"):
        prove_slots(policy, engine)
    with pytest.raises(EngineError) as caught:
        list(engine.rollout(PROMPTS, SAMPLING, seeds=range(3)))
    assert str(caught.value) == NOT_FINITE
    rows = engine.prompt_logprobs(PROMPTS)
    assert not torch.tensor(rows[0]).isfinite().all()


def test_a_trainer_that_overflows_stops_the_proof(changed_model, tiny_model_path) -> None:
    """The engine alone may not: its kernels need not round between two operations."""
    policy = policy_on(changed_model({UP: 1e4, DOWN: 1e4}))
    path = tiny_model_path("llama")
    engine = TorchEngine(policy_on(path), str(path), max_num_seqs=32, max_model_length=64)
    with pytest.raises(RuntimeError, match=r"log-probabilities are not finite.*model.dtype=float16"):
        prove_slots(policy, engine)
