"""Adapters that training cannot start from: each is refused with the reason, before an engine starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_adapters import CONFIG, WEIGHTS, change_config, change_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning"
)

HEAD = {"target_modules": ["lm_head", "q_proj"]}

Save = Callable[..., Path]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "has use_dora=True, which is not supported: vLLM cannot serve DoRA"),
        ({"bias": "lora_only"}, "has bias=lora_only, which is not supported: only the LoRA layers are trained, no biases"),
        ({"lora_bias": True}, "has lora_bias=True, which is not supported: vLLM cannot serve biases of LoRA layers"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], which is not supported: only the LoRA layers"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices=[3], which is not supported: training can only start"),
        ({"alora_invocation_tokens": [7]}, "which is not supported: the adapter is applied to all tokens"),
        ({"an_option_of_tomorrow": 2}, "has an_option_of_tomorrow=2, which is not supported: training can only start"),
        ({"peft_type": "LOHA"}, "is of type LOHA: training can only start from LORA"),
        ({"init_lora_weights": "pissa"}, "was initialised with pissa, which also changes the base weights: convert it"),
        ({"init_lora_weights": "pissa_niter_4"}, "was initialised with pissa_niter_4, which also changes"),
        ({"init_lora_weights": "olora"}, "was initialised with olora, which also changes"),
        ({"init_lora_weights": "corda"}, "was initialised with corda, which also changes"),
        ({"init_lora_weights": "loftq"}, "was initialised with loftq, which also changes"),
        ({"r": "8"}, "is damaged: adapter_config.json has r='8'"),
        ({"lora_alpha": None}, "is damaged: adapter_config.json has lora_alpha=None"),
        ({"rank_pattern": [4]}, "is damaged: adapter_config.json has rank_pattern=[4]"),
        ({"alpha_pattern": {"(": 4}}, "is damaged: '(' in adapter_config.json is no regular expression: missing )"),
        ({"target_modules": "(q"}, "is damaged: '(q' in adapter_config.json is no regular expression: missing )"),
        ({"target_modules": 3}, "is damaged: adapter_config.json has target_modules=3"),
        ({"r": 4}, "is damaged: model.layers.0.mlp.up_proj has A [8, 96], B [160, 8], and rank 4 in adapter_config.json"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_more_than_lora_layers_is_refused(
    save_stock: Save, resolve, values: dict[str, Any], message: str
) -> None:
    folder = save_stock()
    change_config(folder, **values)
    with pytest.raises(ValueError) as caught:
        resolve(folder)
    assert str(caught.value).startswith(f"the adapter in {folder} ") and message in str(caught.value)


def test_fields_of_a_later_peft_that_are_off_are_ignored(save_stock: Save, resolve) -> None:
    folder = save_stock()
    change_config(folder, an_option_of_tomorrow=None, another=False, lora_dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(folder)


def with_changed_head(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.lm_head.base_layer.weight"][5, 5] += 0.01


def with_resized_head(weights: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.lm_head.base_layer.weight"
    weights[name] = torch.cat([weights[name], weights[name][:4]])


def with_a_norm(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.norm.weight"] = torch.ones(96)


def without_a_b(weights: dict[str, torch.Tensor]) -> None:
    del weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def with_an_unknown_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.value_head.weight"] = torch.ones(1)


def changed_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change_first(weights: dict[str, torch.Tensor]) -> None:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        weights[name] = change(weights[name])

    return change_first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_first(lambda a: a * float("nan")), "q_proj.lora_A.weight has values that are not finite"),
        (changed_first(lambda a: a * float("inf")), "q_proj.lora_A.weight has values that are not finite"),
        (changed_first(lambda a: a.to(torch.int8)), "q_proj.lora_A.weight has the type torch.int8"),
        (changed_first(lambda a: a.to(torch.float8_e4m3fn)), "q_proj.lora_A.weight has the type torch.float8_e4m3fn"),
        (with_changed_head, "comes with lm_head.weight, which differs from that of the base model: training changes the LoRA"),
        (with_resized_head, "does not fit this model: it comes with lm_head.weight of shape [264, 96], not [260, 96]; it was"),
        (with_a_norm, "comes with model.norm.weight, which differs from that of the base model: training changes the LoRA"),
        (without_a_b, "is damaged: model.layers.0.self_attn.q_proj has A [8, 96], and rank 8 in adapter_config.json"),
        (with_an_unknown_weight, "does not fit this model: value_head.weight is neither a LoRA layer nor a weight of"),
        (lambda weights: [weights.pop(key) for key in list(weights) if "lora" in key], "has no LoRA layers"),
    ],
)
def test_weights_that_are_no_lora_of_this_model_are_refused(save_stock: Save, resolve, change: Any, message: str) -> None:
    folder = save_stock(**HEAD)
    change_weights(folder, change)
    with pytest.raises(ValueError) as caught:
        resolve(folder)
    assert str(caught.value).startswith(f"the adapter in {folder} ") and message in str(caught.value)


def test_an_adapter_of_another_model_is_refused(save_stock: Save, resolve, tiny_model_path) -> None:
    folder = save_stock("llama64")
    message = f"q_proj is from 128 to 128, not from 96 to 128; it was trained on {tiny_model_path('llama64')}"
    with pytest.raises(ValueError, match=r"does not fit this model: its model\.layers\.0\.") as caught:
        resolve(folder, "llama")
    assert message in str(caught.value) or "up_proj is from 128 to 192, not from 96 to 160" in str(caught.value)


def test_a_layer_that_the_model_does_not_have_is_refused(save_stock: Save, resolve) -> None:
    folder = save_stock()

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if "layers.1." in key]:
            weights[key.replace("layers.1.", "layers.7.")] = weights.pop(key)

    change_weights(folder, rename)
    change_config(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"there is no layer model\.layers\.7\.\S+ that can have it; was it trained on an"):
        resolve(folder)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, {"targets": "qkv"}, r"^lora.targets: the adapter in .* also has model\.layers\.0\.mlp\.up_proj, \S+: add them"),
        ({"r": 100}, {"max_rank": 64}, r"^lora.max_rank: must be at least lora.rank, which is 100 \(got 64\)"),
        ({"r": 100}, {"rank": 8, "max_rank": 64}, r"^lora.max_rank: must be at least lora.rank, which is 100 \(got 64\)"),
        ({"rank_pattern": {"q_proj": 100}}, {"max_rank": 64}, r"^lora.max_rank: must be at least the largest rank in lora.r"),
        ({"r": 130}, {}, r"^the adapter in .* has rank 130 in \S+: at most 128 can be trained"),
        ({}, {"rank": 8, "alpha_pattern": {"w_proj": 3}}, r"^lora.alpha_pattern: w_proj applies to no layer"),
    ],
)
def test_options_that_the_adapter_does_not_fit_are_refused(
    save_stock: Save, resolve, theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    folder = save_stock(**theirs)
    with pytest.raises(ValueError, match=message):
        resolve(folder, **ours)


def test_an_adapter_of_a_model_with_fewer_layers_is_refused(save_stock: Save, resolve) -> None:
    """All of its shapes fit, and half of the model would have no adapter."""
    folder = save_stock()
    change_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "layers.1." in key])
    message = r"does not fit this model: its target_modules also select model\.layers\.1\.self_attn\.q_proj, .* no weights; it"
    with pytest.raises(ValueError, match=message):
        resolve(folder)


class NotATensor:
    """Something that only a pickle can hold."""


def test_a_file_that_is_not_safe_to_load_is_refused(save_stock: Save, resolve) -> None:
    folder = save_stock()
    (folder / WEIGHTS).unlink()
    torch.save({"a": NotATensor()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin has more than tensors, which is not safe to load: save"):
        resolve(folder)
    (folder / "adapter_model.bin").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"^the adapter in .* is damaged: "):
        resolve(folder)
    torch.save({"a": 3}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"is damaged: adapter_model\.bin has other things than tensors"):
        resolve(folder)


@pytest.mark.parametrize(("file", "message"), [(WEIGHTS, "is damaged: "), (CONFIG, "is damaged: adapter_config.json is not")])
def test_a_damaged_file_is_refused(save_stock: Save, resolve, file: str, message: str) -> None:
    folder = save_stock()
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"^the adapter in {folder} {message}"):
        resolve(folder)


def test_an_adapter_without_names_of_targets_has_those_of_its_weights(save_stock: Save, resolve) -> None:
    folder = save_stock()
    expected, _ = resolve(folder)
    change_config(folder, target_modules=None)
    config, _ = resolve(folder)
    names = [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj")]
    assert sorted(config.lora.targets) == names and config.lora.rank == expected.lora.rank
