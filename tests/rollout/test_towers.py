"""Checkpoints with a vision tower: vLLM leaves the tower out, and shares weights and adapter of the text part."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make_family
from safetensors.torch import save_file
from tiny_runs import many_low_ids, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import LoraConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import prove_slots

pytestmark = pytest.mark.engine

ZOO = Path(__file__).parents[2] / "scripts" / "zoo.py"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files have names of an earlier version of transformers, as the published ones do."""
    with quiet_stderr():
        return make_family(tmp_path_factory.mktemp("vision") / "gemma3", "gemma3-vision")


def test_the_text_part_is_held_once_and_computes_what_vllm_does(make_engine: Callable, gemma: Path) -> None:
    engine = make_engine(model=str(gemma), keep_base_weights=True)
    names = {name for name, _ in engine._apply_model(lambda model: list(model.named_parameters()))}
    assert names and all(name.startswith("language_model.") for name in names), "vLLM holds no weight of the tower"
    policy = Policy(
        str(gemma), lora=LoraConfig(rank=16), dtype="float32", slots=engine.slots, shared=engine.base_weights()
    )
    assert policy.base.unshared == () and policy.base.shared_bytes > 0
    of_vllm = {w.untyped_storage().data_ptr() for w in engine._apply_model(lambda model: list(model.parameters()))}
    assert {w.untyped_storage().data_ptr() for w in policy.base.weights.values()} <= of_vllm
    assert set(policy.layers) <= set(engine.slots)
    assert all(proof.gap <= 0.01 * proof.effect for proof in prove_slots(policy, engine))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["gemma3-vision", "qwen3.5-vision"])
def test_a_run_saves_an_adapter_that_stock_peft_and_stock_vllm_load(family: str) -> None:
    """Two steps with vLLM, the proof of each layer, and log-probabilities of stock PEFT, stock vLLM and the trainer."""
    done = subprocess.run([sys.executable, ZOO, "--family", family], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 and "1 of 1 families trained" in done.stdout, done.stdout + done.stderr[-2000:]


def test_a_checkpoint_that_cannot_be_trained_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    import transformers
    from tiny_models import SIZES, tiny_tokenizer

    text = {"model_type": "llama", **SIZES}
    tower = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlavaConfig(text_config=text, vision_config=tower).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save_file({"none.weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")  # whoever loads it fails otherwise
    config = tiny_config(tmp_path / "run", model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"^a checkpoint of type llava has a vision or audio tower"):
        GRPOTrainer(reward_funcs=many_low_ids, args=config, train_dataset=[{"prompt": "a", "target": 1}])
    assert not (tmp_path / "run").exists()
