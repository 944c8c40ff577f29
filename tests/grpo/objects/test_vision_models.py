"""A model object with a vision tower as `model`: its files are found again, and its text part is what is selected from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import make_family
from family_checks import stock_class
from peft import LoraConfig as PeftLoraConfig
from tiny_models import SIZES

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.common.weight_files import files_of_weights
from rankup.grpo.config import ModelConfig
from rankup.grpo.model.saved_weights import saved_weights
from rankup.grpo.objects.base import base_of
from rankup.grpo.objects.found import different_weight, is_same_model
from rankup.grpo.objects.targets import structure_of, targets_of
from rankup.grpo.objects.weights import plain_weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["gemma3-vision", "mistral3", "qwen2.5-vl", "qwen3-vl", "qwen3.5-vision"])
def test_its_folder_is_used_under_old_names_too_and_a_changed_weight_is_seen(tmp_path: Path, family: str) -> None:
    with quiet_stderr():
        folder = make_family(tmp_path / "model", family)
        model = stock_class(folder).from_pretrained(folder)
    saved, weights = saved_weights(model, files_of_weights(folder)), plain_weights(model)
    names = sorted(weights.keys() & saved.files.keys())
    assert is_same_model(model, weights, folder, dtype=torch.float32)
    norm = next(name for name in names if "language_model.layers.1" in name and "norm" in name)
    with torch.no_grad():
        model.get_parameter(norm).add_(1)
    assert not is_same_model(model, plain_weights(model), folder, dtype=torch.float32)
    assert different_weight(plain_weights(model), saved, names, dtype=torch.float32) == norm


def test_its_folder_is_used_and_layers_of_the_tower_are_not_selected(tmp_path: Path) -> None:
    with quiet_stderr():
        folder = make_family(tmp_path / "model", "qwen3-vl")
        model = stock_class(folder).from_pretrained(folder)
    assert base_of(model, ModelConfig(), None).name == str(folder)
    config = PeftLoraConfig(target_modules=["q_proj", "linear_fc1"], layers_to_transform=[1], layers_pattern="layers")
    assert targets_of(config, lambda: structure_of(model)) == r"model\.language_model\.layers\.1\.self_attn\.q_proj"


def test_an_object_of_another_kind_is_refused() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **SIZES}, vision_config=vision)
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"^a checkpoint of type llava has a vision or audio tower"):
        base_of(model, ModelConfig(), None)
