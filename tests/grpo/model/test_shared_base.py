"""Trainer and vLLM on one copy of the base weights, and on the same rounded ones: real engines."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sample_groups import random_groups
from tiny_models import tiny_tokenizer
from tiny_runs import steps_of, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from rankup.grpo.config import GRPOConfig, LoraConfig
from rankup.grpo.model.base_model import load_base, nf4_names
from rankup.grpo.model.packing import pack
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import prove_slots, trainer_logprobs
from rankup.grpo.update.resolve import engine_settings
from rankup.grpo.update.session import make_policy
from rankup.kernels.nf4 import Nf4Weight

pytestmark = pytest.mark.engine

SEQUENCES = [[5, 9, 14, 3, 77, 60, 31, 8], [7, 21, 40, 2, 90, 55]]
EXACT = 3e-4  # fp32 on both sides, other kernels


def policy_on(path: Path, **arguments: Any) -> Policy:
    return Policy(str(path), lora=LoraConfig(rank=16, init_lora_weights="gaussian"), dtype="float32", **arguments)


def results(policy: Policy) -> list[torch.Tensor]:
    """Log-probabilities and every gradient of a pack, under an adapter that matters."""
    with torch.no_grad():
        for n, master in enumerate(policy.masters):
            master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(n)) / 9)
    policy.write_slots()
    (one,) = pack(random_groups([(5, [4, 1, 6]), (3, [7])]), tokens_per_pack=1000)
    _, logprobs_N, _ = policy.backward(one, lambda logprobs_N, *_: -logprobs_N)
    return [logprobs_N, *(master.grad for master in policy.masters if master.grad is not None)]


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_on_vllms_weights_the_trainer_computes_the_same_bits(make_engine, tiny_model_path, kind: str) -> None:
    """Grouped and biased q, k and v, tied and untied heads: all of them are views, and the numbers are those of the files."""
    engine = make_engine(kind, keep_base_weights=True)
    unshared = policy_on(tiny_model_path(kind))
    shared = policy_on(tiny_model_path(kind), shared=engine.base_weights())
    assert shared.base.unshared == () and shared.base.shared_bytes == unshared.base.unshared_bytes
    of_vllm = {w.untyped_storage().data_ptr() for w in engine._apply_model(lambda model: list(model.parameters()))}
    assert {w.untyped_storage().data_ptr() for w in shared.base.weights.values()} <= of_vllm
    results_of_both = zip(results(unshared), results(shared), strict=True)
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in results_of_both)
    shared.attach(engine.slots)
    assert all(proof.gap <= 0.01 * proof.effect for proof in prove_slots(shared, engine))


def test_weights_that_vllm_keeps_on_cpu_are_shared_by_default(make_engine, tiny_model_path) -> None:
    engine = make_engine("llama")
    policy = policy_on(tiny_model_path("llama"), shared=engine.base_weights())
    assert all(name.endswith("_proj.weight") for name in policy.base.unshared) and len(policy.base.unshared) == 2 * 7
    assert policy.base.shared_bytes == 4 * (260 * 96 + 5 * 96)
    assert all(torch.equal(a, b) for a, b in zip(results(policy), results(policy_on(tiny_model_path("llama"))), strict=True))


@pytest.mark.parametrize(("kind", "keep"), [("llama", False), ("qwen2", True)])
def test_trainer_and_sampler_round_to_the_same_4_bits(make_engine, tiny_model_path, kind: str, keep: bool) -> None:
    path = tiny_model_path(kind)
    engine = make_engine(kind, keep_base_weights=keep, nf4_weights=nf4_names(str(path)))
    plain, packed = policy_on(path), policy_on(path, load_in="nf4")
    shared = policy_on(path, load_in="nf4", shared=engine.base_weights())
    assert packed.base.unshared_bytes < plain.base.unshared_bytes / 2 and bool(shared.base.unshared) != keep
    assert all(torch.equal(a, b) for a, b in zip(results(packed), results(shared), strict=True))
    of_engine, of_packed, of_plain = (
        torch.tensor([lp for sequence in logprobs for lp in sequence])
        for logprobs in (
            engine.prompt_logprobs(SEQUENCES, use_adapter=False),
            trainer_logprobs(packed, SEQUENCES, use_adapter=False),
            trainer_logprobs(plain, SEQUENCES, use_adapter=False),
        )
    )
    assert (of_engine - of_packed).abs().max() < EXACT
    assert (of_engine - of_plain).abs().mean() > 100 * EXACT, "rounding shows"
    shared.attach(engine.slots)
    assert all(proof.gap <= 0.01 * proof.effect for proof in prove_slots(shared, engine, each=True))


def test_a_run_on_shared_weights_leaves_them_as_they_were(
    make_trainer, engine_shelf, tiny_model_path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"engine": "vllm", "share_base_weights": True, "load_in": "nf4", "max_steps": 3}
    settings = engine_settings(tiny_config(tmp_path, **changes), str(tiny_model_path("llama")))
    engine = engine_shelf.get(settings)
    before = fingerprint(engine.base_weights())
    make_trainer(**changes).train(engine=engine)
    assert fingerprint(engine.base_weights()) == before
    assert "held once for trainer and vLLM\n" in capsys.readouterr().out, "and the trainer holds no other weights"
    assert all(step["updates"] == 1 and step["grad_norm"] > 0 for step in steps_of(tmp_path / "run"))
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())


@pytest.fixture
def wide_model(tiny_model_path, tmp_path: Path) -> Iterator[Path]:
    """A Llama in bf16 of 94 MB, nearly all of it in linear layers, each of them small compared with the model."""
    config = AutoConfig.from_pretrained(tiny_model_path("llama"))
    config.update({"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 24})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    yield tmp_path / "wide"
    shutil.rmtree(tmp_path / "wide")


def memory_in_use() -> int:
    """Bytes of this process that are resident once all that is free was returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def test_shared_weights_are_in_memory_once(engine_shelf, wide_model: Path) -> None:
    path = str(wide_model)
    config = GRPOConfig(
        kv_cache_gib=1 / 64, rank=8, share_base_weights=True, max_prompt_length=64, max_completion_length=64
    )
    engine = engine_shelf.get(engine_settings(config, path))
    added, unshared, logprobs = {}, {}, {}
    for share in (True, False, True):  # the first one also loads libraries
        before = memory_in_use()
        policy = make_policy(GRPOConfig(rank=8, share_base_weights=share), path, engine)
        logprobs[share] = trainer_logprobs(policy, SEQUENCES)
        added[share], unshared[share] = memory_in_use() - before, policy.base.unshared_bytes
        del policy
    assert unshared[True] == 0 and unshared[False] > 90e6
    assert added[False] - added[True] > 0.8 * unshared[False]
    assert added[True] < 0.5 * unshared[False], "its adapter, and no copy of the base model"
    assert logprobs[True] == logprobs[False]


def test_weights_are_rounded_to_4_bits_one_after_another(tiny_model_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While loading, at most the weight that is rounded and its predecessor are in memory unpacked."""
    unpacked: list[weakref.ref[torch.Tensor]] = []
    in_memory: list[int] = []
    quantise = Nf4Weight.quantise

    def watched(weight: torch.Tensor) -> Nf4Weight:
        unpacked.append(weakref.ref(weight))
        in_memory.append(sum(reference() is not None for reference in unpacked))
        return quantise(weight)

    monkeypatch.setattr(Nf4Weight, "quantise", watched)
    load_base(str(tiny_model_path("llama")), dtype=torch.float32, load_in="nf4")
    assert len(in_memory) == 2 * 7 and max(in_memory) <= 2


MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from rankup import GRPOConfig
from rankup.grpo.update.resolve import engine_settings
from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_loggers, quiet_stderr
from rankup.grpo.update.session import make_policy
from rankup.grpo.model.prove import trainer_logprobs
from rankup.kernels.nf4 import Nf4Weight
from rankup.rollout.engine import RolloutEngine

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

quiet_loggers()
config = GRPOConfig(kv_cache_gib=0.1, rank=8, **json.loads(sys.argv[1]))
model_path = resolve_model(config.model.name)
with quiet_stderr():
    engine = RolloutEngine(engine_settings(config, model_path))
    Nf4Weight.quantise(torch.randn(64, 64))  # libraries are loaded
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is reset
engine_alone = resident("VmRSS")
from rankup.grpo.model.base_model import load_base
shared = engine.base_weights() if config.model.share_base_weights else None
base = load_base(model_path, dtype=torch.bfloat16, load_in=config.model.load_in, shared=shared)
peak = resident("VmHWM") - engine_alone
assert sum(weight.float().sum().item() for weight in base.weights.values()) != 0  # mapped memory is resident once it is read
del base
gc.collect()
with quiet_stderr():
    policy = make_policy(config, model_path, engine)
    logprobs = trainer_logprobs(policy, [[1, 504, 3575, 282, 4649, 314], [1, 19556, 28]])
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
unshared = policy.base.unshared_bytes
print(json.dumps({"resident": resident("VmRSS"), "peak_of_base": peak, "unshared": unshared, "logprobs": logprobs}))
"""


def measured(**model: Any) -> dict[str, Any]:
    """Memory of engine and policy on the embedded model, in a separate process."""
    command = [sys.executable, "-c", MEASURE, json.dumps(model)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_memory_of_the_embedded_model() -> None:
    base = 2 * 134_515_008
    unshared, shared, nf4 = measured(share_base_weights=False), measured(share_base_weights=True), measured(load_in="nf4")
    assert unshared["resident"] - shared["resident"] >= 0.9 * base
    assert unshared["logprobs"] == shared["logprobs"]
    assert (unshared["unshared"], shared["unshared"]) == (base, 0)
    assert nf4["peak_of_base"] < 0.35 * base
