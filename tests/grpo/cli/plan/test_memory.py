"""The parts of a run's memory that are counted, and the peak of real updates on CPU compared with the sum of all parts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankup.grpo.cli.plan import memory
from rankup.grpo.cli.plan.memory import (
    BF16,
    FP32,
    Device,
    base_bytes,
    changed,
    engine_parts,
    kv_bytes_per_token,
    training_parts,
    unshared_base_bytes,
)
from rankup.grpo.cli.plan.shapes import Matrix, ModelShape
from rankup.grpo.config import GRPOConfig
from rankup.kernels.device import native_dtype

MEASURE = Path(__file__).resolve().parents[4] / "scripts" / "bench" / "plan_memory.py"
PASS = {"activations": 1_000, "logits_chunk": 100, "hidden_states": 10}


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> ModelShape:
    """One layer of D 8 and M 20, 2 heads of 4, one of them for keys; a pass takes `PASS`."""
    monkeypatch.setattr(memory, "pass_parts", lambda *_: dict(PASS))
    layer = "model.layers.0"
    attention = [(f"{layer}.self_attn.{name}", 8, d_out) for name, d_out in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4))]
    mlp = [(f"{layer}.mlp.{name}", *sizes) for name, *sizes in (("gate_proj", 8, 20), ("up_proj", 8, 20), ("down_proj", 20, 8))]
    linear = [*attention, (f"{layer}.self_attn.o_proj", 8, 8), *mlp]
    return ModelShape(
        architecture="Tiny",
        layers=1,
        hidden=8,
        intermediate=20,
        heads=2,
        kv_heads=1,
        head_dim=4,
        vocabulary=100,
        tied=True,
        biases=(),
        parameters=1_500,
        quantisable=672,
        matrices=tuple(Matrix(*one) for one in linear),
        measured_config={},
    )


def parts(shape: ModelShape, changes: dict[str, Any], device: Device = "cpu") -> dict[str, int]:
    return training_parts(shape, changed(GRPOConfig(), changes), device)


def test_the_adapter_takes_eighteen_bytes_a_parameter_where_its_rank_fills_the_slot(shape: ModelShape):
    of_64 = parts(shape, {"lora.rank": 64})
    adapter = 64 * shape.parameters_per_rank("all-linear")
    sizes = [of_64[name] for name in ("adapter_slots", "adapter_masters", "adapter_gradients", "optimizer")]
    assert sizes == [BF16 * adapter, FP32 * adapter, FP32 * adapter, 2 * FP32 * adapter]
    assert parts(shape, {"lora.rank": 16})["adapter_slots"] == of_64["adapter_slots"]  # padded to vLLM's rank


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_in_eight_bits_takes_two_bytes_a_parameter_and_its_scales(shape: ModelShape, optimizer: str):
    wide, narrow = (parts(shape, {"optim.optimizer": name}) for name in ("adamw", optimizer))
    adapter = 64 * shape.parameters_per_rank("all-linear")
    assert narrow["optimizer"] == pytest.approx(adapter * (2 + 2 * 4 / 256), abs=1)
    assert wide["guards_snapshot"] - narrow["guards_snapshot"] == wide["optimizer"] - narrow["optimizer"]


def test_nf4_leaves_embeddings_head_and_norms_in_bf16(shape: ModelShape):
    assert base_bytes(shape, None) == 2 * 1_500
    assert base_bytes(shape, "nf4") == round(672 / 2 + 4 * 672 / 64) + 2 * (1_500 - 672)


@pytest.mark.parametrize(
    ("device", "sharing", "load_in", "unshared"),
    [
        ("cuda", "auto", None, 0),
        ("cuda", "auto", "nf4", 0),
        ("cuda", False, None, 2 * 1_500),
        ("cuda", False, "nf4", 378 + 2 * (1_500 - 672)),
        ("cpu", True, None, 0),
        ("cpu", "auto", None, 2 * (672 + 8 + 4)),  # linear layers, with their biases
        ("cpu", "auto", "nf4", 378 + 2 * (8 + 4)),
        ("cpu", False, None, 2 * 1_500),
    ],
)
def test_the_trainer_holds_the_weights_that_it_does_not_share_with_vllm(
    shape: ModelShape, device: Device, sharing: Any, load_in: str | None, unshared: int
):
    with_biases = dataclasses.replace(shape, biases=("q_proj", "k_proj"))
    held = {"model.share_base_weights": sharing, "model.load_in": load_in}
    assert unshared_base_bytes(with_biases, changed(GRPOConfig(), held), device) == unshared
    assert parts(with_biases, held, device).get("base_weights", 0) == unshared
    assert engine_parts(with_biases, device)["base_weights"] == 2 * 1_500


def test_the_memory_of_a_pass_is_part_of_the_sum(shape: ModelShape):
    assert parts(shape, {}, "cuda").items() >= PASS.items()
    assert parts(shape, {}, "cuda")["gaps"] == 100


def test_a_token_of_the_kv_cache(shape: ModelShape):
    assert kv_bytes_per_token(shape) == 2 * 1 * 1 * 4 * 2


@pytest.mark.slow
@pytest.mark.skipif(native_dtype() != "bfloat16", reason="this CPU emulates bf16: one update takes a quarter of an hour")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--rank", "64", "--tokens-per-pack", "4096"], marks=pytest.mark.exhaustive, id="rank 64"),
        pytest.param(["--rank", "128", "--tokens-per-pack", "2048"], id="rank 128"),
        pytest.param(
            ["--rank", "64", "--tokens-per-pack", "2048", "--gradient-checkpointing"],
            marks=pytest.mark.exhaustive,
            id="checkpointing",
        ),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(arguments: list[str]):
    # In the third update the guards' first snapshot with optimizer state coexists with activations: later ones take no more.
    result = subprocess.run(
        [sys.executable, MEASURE, "--repeats", "3", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["estimated_bytes"] == pytest.approx(figures["measured_bytes"], rel=0.1)
