"""The parts of a run's memory that are counted, and the peak of real updates on CPU compared with the sum of all parts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory import parts as parts_of_memory
from rankup.grpo.memory.parts import (
    BF16,
    FP32,
    Device,
    base_bytes,
    changed,
    engine_parts,
    training_parts,
    unshared_base_bytes,
)
from rankup.grpo.memory.shapes import ModelShape, read_shape
from rankup.kernels.device import native_dtype

MEASURE = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "plan_memory.py"
NATIVE_BF16 = pytest.mark.skipif(
    native_dtype() != "bfloat16", reason="this CPU emulates bf16: one update takes a quarter of an hour"
)
PASS = {"activations": 1_000, "logits_chunk": 100, "hidden_states": 10}


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
LINEAR = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 20
BIASES = 8 + 4 + 4 + 8
PARAMETERS = LINEAR + 100 * 8 + 3 * 8  # and the embedding, and the norms


@pytest.fixture
def shape_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModelShape]:
    """A Llama of one layer with changes; a pass takes `PASS`."""
    monkeypatch.setattr(parts_of_memory, "pass_parts", lambda *_: dict(PASS))

    def made(**changes: Any) -> ModelShape:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        return read_shape(str(tmp_path))

    return made


@pytest.fixture
def shape(shape_of: Callable[..., ModelShape]) -> ModelShape:
    return shape_of()


def parts(shape: ModelShape, changes: dict[str, Any], device: Device = "cpu") -> dict[str, int]:
    return training_parts(shape, changed(GRPOConfig(tokens_per_pack=4096), changes), device)


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
    assert base_bytes(shape, None) == 2 * PARAMETERS
    assert base_bytes(shape, "nf4") == round(LINEAR / 2 + 4 * LINEAR / 64) + 2 * (PARAMETERS - LINEAR)


@pytest.mark.parametrize(
    ("device", "sharing", "load_in", "unshared"),
    [
        ("cuda", "auto", None, 0),
        ("cuda", "auto", "nf4", 0),
        ("cuda", False, None, 2 * (PARAMETERS + BIASES)),
        ("cuda", False, "nf4", 378 + 2 * (PARAMETERS + BIASES - LINEAR)),
        ("cpu", True, None, 0),
        ("cpu", "auto", None, 2 * (LINEAR + BIASES)),
        ("cpu", "auto", "nf4", 378 + 2 * BIASES),
        ("cpu", False, None, 2 * (PARAMETERS + BIASES)),
    ],
)
def test_the_trainer_holds_the_weights_that_it_does_not_share_with_vllm(
    shape_of: Callable[..., ModelShape], device: Device, sharing: Any, load_in: str | None, unshared: int
):
    with_biases = shape_of(attention_bias=True)
    held = {"model.share_base_weights": sharing, "model.load_in": load_in}
    assert unshared_base_bytes(with_biases, changed(GRPOConfig(), held), device) == unshared
    assert parts(with_biases, held, device).get("base_weights", 0) == unshared
    assert engine_parts(with_biases, GRPOConfig(), device)["base_weights"] == 2 * (PARAMETERS + BIASES)


def test_the_memory_of_a_pass_is_part_of_the_sum(shape: ModelShape):
    assert parts(shape, {}, "cuda").items() >= PASS.items()
    assert parts(shape, {}, "cuda")["gaps"] == 100


def assert_the_estimate_is_within_a_tenth(folder: Path, *arguments: Any) -> None:
    # In the third update the guards' first snapshot with optimizer state coexists with activations: later ones take no more.
    result = subprocess.run(
        [sys.executable, MEASURE, "--repeats", "3", "--json", folder / "figures.json", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["estimated_bytes"] == pytest.approx(figures["measured_bytes"], rel=0.1)


@pytest.mark.slow
@NATIVE_BF16
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--rank", "64", "--tokens-per-pack", "4096"], id="rank 64"),
        pytest.param(["--rank", "128", "--tokens-per-pack", "2048"], id="rank 128"),
        pytest.param(["--rank", "64", "--tokens-per-pack", "2048", "--gradient-checkpointing"], id="checkpointing"),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(tmp_path: Path, arguments: list[str]):
    assert_the_estimate_is_within_a_tenth(tmp_path, *arguments)


@pytest.mark.slow
@NATIVE_BF16
def test_the_estimate_for_a_few_layers_is_within_a_tenth_of_the_measured_peak(tmp_path: Path):
    """A fifth of SmolLM2-135M, with a third of its vocabulary: a fifth of the time, and no part of the sum is small."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 16384}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    assert_the_estimate_is_within_a_tenth(tmp_path, "--model", tmp_path / "model", "--rank", "128", "--tokens-per-pack", "2048")
