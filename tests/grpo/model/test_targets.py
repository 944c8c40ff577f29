"""What the presets of `lora.targets` mean: the layers of a model's own decoder, whatever it calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, config_of
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tiny_models import SIZES
from transformers import PreTrainedModel

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.adapters import inject
from rankup.grpo.model.targets import find_targets, preset_of, role
from rankup.rollout.adaptable import EXPERTS_BY_NAME, MAMBA, NAMES_OF_EXPERTS, SPLIT
from rankup.rollout.model_classes import auto_class, build_model

QKV = {"q_proj", "k_proj", "v_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
# Of families whose layers are not all called q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj: the layers of
# `qkv`, those that `attention` adds, and those that `all-linear` adds to these.
NAMES: dict[str, tuple[set[str], set[str], set[str]]] = {
    "gemma4": (QKV, {"o_proj"}, {*MLP, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}),
    "glm4": (QKV, {"o_proj"}, {"down_proj"}),
    "phi3": ({"qkv_proj"}, {"o_proj"}, {"gate_up_proj", "down_proj"}),
    "qwen3-moe": (QKV, {"o_proj"}, set()),
    "gpt-oss": (QKV, {"o_proj"}, set()),
    "qwen3-next": ({*QKV, "in_proj_qkvz", "in_proj_ba"}, {"o_proj", "out_proj"}, set()),
    "glm4-moe": (QKV, {"o_proj"}, set()),
    "granite4-hybrid": ({*QKV, "in_proj"}, {"o_proj", "out_proj"}, {"input_linear", "output_linear"}),
    "nemotron-h": ({*QKV, "in_proj"}, {"o_proj"}, {"up_proj", "down_proj"}),
    "lfm2": ({*QKV, "in_proj"}, {"out_proj"}, {"w1", "w2", "w3"}),
    "qwen3.5": ({*QKV, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}, {"o_proj", "out_proj"}, MLP),
    "gemma4-vision": (QKV, {"o_proj"}, {*MLP, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}),
    "qwen3.5-vision": ({*QKV, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}, {"o_proj", "out_proj"}, MLP),
}
USUAL = (QKV, {"o_proj"}, MLP)


def empty_family(name: str) -> PreTrainedModel:
    """A tiny model of a family without memory for its weights."""
    with torch.device("meta"):
        return build_model(config_of(name))


def roles(model: PreTrainedModel, targets: str) -> set[str]:
    return {role(name) for name in find_targets(model, targets).modules}


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_are_the_layers_of_the_model(family: str):
    model = empty_family(family)
    qkv, outputs, others = NAMES.get(family, USUAL)
    assert roles(model, "qkv") == qkv
    assert roles(model, "attention") == qkv | outputs
    assert roles(model, "all-linear") == qkv | outputs | others


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["qkv", "attention", "all-linear"])
def test_peft_adapts_the_layers_of_a_preset_and_no_others(family: str, preset: str):
    targets = find_targets(empty_family(family), preset)
    with torch.device("meta"):  # with the tower, if the checkpoint has one: none of its layers may be adapted
        complete = auto_class(config_of(family)).from_config(config_of(family))
    stock: Any = get_peft_model(complete, PeftLoraConfig(r=2, target_modules=targets.names, task_type="CAUSAL_LM"))
    assert set(stock.base_model.targeted_module_names) == set(targets.modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_is_recognised_by_its_layers(family: str):
    model = empty_family(family)
    found = find_targets(model, "all-linear").modules
    assert preset_of(model, found) in ("attention", "all-linear"), "they are the same where all MLPs are experts"
    assert preset_of(model, list(found)[1:]) is None


@pytest.mark.parametrize(
    ("family", "note"),
    [
        ("qwen3-moe", "leaves out the experts (down_proj, gate_up_proj): they are frozen"),
        ("gpt-oss", "leaves out the experts (down_proj, gate_up_proj): they are frozen"),
        ("nemotron-h", f"leaves out out_proj: {MAMBA}"),
        ("glm4", f"leaves out gate_up_proj: {SPLIT}"),
    ],
)
def test_what_a_preset_leaves_out_is_said(family: str, note: str):
    model = empty_family(family)
    assert find_targets(model, "all-linear").notes == (f"lora.targets=all-linear {note}",)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NAMES])
def test_nothing_is_left_out_of_other_models(family: str):
    assert find_targets(empty_family(family), "all-linear").notes == ()


def test_the_models_whose_experts_peft_adapts_by_names_of_layers_are_known():
    from peft.utils import transformers_weight_conversion

    conversion: Any = transformers_weight_conversion
    kinds = {kind for kind, of in conversion._MODEL_TO_CONVERSION_PATTERN.items() if of == "qwen2_moe"}
    assert kinds | {"qwen2_moe"} == EXPERTS_BY_NAME
    assert set(conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"]) - {"gate"} == set(NAMES_OF_EXPERTS)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_a_layer_that_peft_takes_for_experts_is_refused_if_it_is_named():
    model = empty_family("glm4-moe")
    lora = LoraConfig(targets=["q_proj", "up_proj", "gate_proj"])
    message = r"^lora.targets: PEFT does not adapt model\.layers\.0\.mlp\.gate_proj, .* takes such names for the experts"
    with pytest.raises(ValueError, match=message):
        inject(model, lora, 0)


def test_a_vision_tower_is_no_part_of_a_preset():
    """Its layers have the same names as those of the decoder."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(**SIZES | FAMILIES["gemma3"].options)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    targets = find_targets(model, "all-linear")
    assert {name.rpartition(".layers.")[0] for name in targets.modules} == {"model.language_model"}
    assert {role(name) for name in targets.modules} == QKV | {"o_proj"} | MLP
    assert isinstance(targets.names, str), "an expression, since names alone would match the tower too"
    stock: Any = get_peft_model(model, PeftLoraConfig(r=2, target_modules=targets.names))
    assert set(stock.base_model.targeted_module_names) == set(targets.modules)


def test_a_preset_without_layers_is_an_error():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"^lora.targets: GPT2LMHeadModel has no layers that qkv selects; name layers"):
        find_targets(model, "qkv")
