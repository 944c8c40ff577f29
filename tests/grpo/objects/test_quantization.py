"""bitsandbytes' NF4 is `model.load_in=nf4`; everything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

from rankup import GRPOConfig
from rankup.grpo.objects.adapter import adapter_name, base_model_of, save_adapter
from rankup.grpo.objects.base import base_of
from rankup.grpo.objects.given import Given, from_objects

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def given(config: GRPOConfig | None = None, model: Any = "some/model", **options: Any) -> Given:
    return from_objects(config or GRPOConfig(), model=model, quantization_config=BitsAndBytesConfig(**options))


def test_nf4_is_an_option():
    found = given(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    assert (found.config.model.name, found.config.model.load_in, found.config.model.dtype) == ("some/model", "nf4", "bfloat16")
    assert found.notes == ()


def test_what_differs_is_noted():
    found = given(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float16")
    assert found.config.model.dtype == "bfloat16"
    assert found.config.notes == (
        "quantization_config: products are computed in bfloat16 (model.dtype), not in float16",
        "quantization_config: no double quantization here; the scales of NF4 stay in float32",
    )
    assert given(GRPOConfig(dtype="float32"), **NF4).notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "fp4 is not supported; set BitsAndBytesConfig"),
        ({"load_in_8bit": True}, "8 bits are not supported; set BitsAndBytesConfig"),
        ({}, "it quantizes nothing"),
        ({**NF4, "llm_int8_skip_modules": ["lm_head", "o_proj"]}, "llm_int8_skip_modules: o_proj cannot be left out"),
    ],
)
def test_other_quantizations_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        given(**options)


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match="quantization_config: GPTQConfig is not supported"):
        from_objects(GRPOConfig(), model="m", quantization_config=GPTQConfig(bits=4))


def test_no_quantization_in_the_configuration_contradicts_it():
    with pytest.raises(ValueError, match=r"is nf4, and the configuration sets model.load_in to None"):
        given(GRPOConfig(model={"load_in": None}), **NF4)
    assert given(GRPOConfig(load_in="nf4"), **NF4).config.model.load_in == "nf4"


def test_it_has_no_effect_on_a_loaded_model(load_model, tiny_model_path):
    found = given(model=load_model(), **NF4)
    assert (found.config.model.name, found.config.model.load_in) == (str(tiny_model_path("llama")), None)
    assert found.notes == ("quantization_config: no effect, as in TRL; the model is loaded already",)


# ---------------------------------------------------------------------------------- models that bitsandbytes quantized


@pytest.fixture
def quantized(tiny_model_path):
    """A function that loads a tiny model in 4 bits."""

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tiny_model_path("llama64"), dtype=torch.float32, quantization_config=BitsAndBytesConfig(**{**NF4, **options})
        )

    return load


def test_a_model_in_nf4_is_read_from_its_files_again(quantized, tiny_model_path, cache):
    found = from_objects(GRPOConfig(), model=quantized())
    model = found.config.model
    assert (model.name, model.load_in, model.dtype) == (str(tiny_model_path("llama64")), "nf4", "float32")
    assert found.notes == (f"model: its linear layers are read from {model.name} again, and rounded to NF4",)
    assert not cache.exists()


def test_a_model_in_nf4_with_other_weights_than_its_files_is_refused(quantized):
    model = quantized()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    with pytest.raises(ValueError, match=r"its model.norm.weight differs from the files of"):
        from_objects(GRPOConfig(), model=model)


def test_a_model_in_fp4_is_refused(quantized):
    with pytest.raises(ValueError, match="fp4 is not supported"):
        from_objects(GRPOConfig(), model=quantized(bnb_4bit_quant_type="fp4"))


def test_a_model_whose_files_are_quantized_is_refused(quantized, tmp_path):
    quantized().save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"the files of .*packed are quantized: pass the original model"):
        from_objects(GRPOConfig(), model=model)


def test_an_adapter_on_a_model_in_nf4_is_saved_by_itself(quantized, tiny_model_path, cache):
    model = get_peft_model(quantized(), LoraConfig(r=4, target_modules=["q_proj"]))
    base = base_of(base_model_of(model), GRPOConfig().model, None)
    assert (base.name, base.load_in) == (str(tiny_model_path("llama64")), "nf4")
    folder = save_adapter(model, adapter_name(model), base=base.name)
    names = sorted(load_file(folder / "adapter_model.safetensors"))
    assert len(names) == 4 and names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not (cache / "models").exists()
