"""A model object with a vision tower as `model`: its files are found again, and its text part is what is selected from."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from families import make_family
from family_checks import stock_class
from peft import LoraConfig as PeftLoraConfig
from tiny_models import SIZES

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import ModelConfig
from rankup.grpo.objects.base import base_of
from rankup.grpo.objects.targets import structure_of, targets_of

pytestmark = pytest.mark.slow


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
