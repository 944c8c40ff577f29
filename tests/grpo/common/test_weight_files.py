"""Files of weights: the index decides, files beside them are not read, and incomplete or quantized ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM

from rankup.grpo.cli.export.export import merge
from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.weight_files import INDEX, SINGLE, files_of_weights, find_weights
from rankup.grpo.model.base_model import load_base, nf4_names

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def single(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a model in one file."""
    return shutil.copytree(tiny_model_path("llama64"), tmp_path / "model")


@pytest.fixture
def sharded(single: Path) -> Path:
    """A model in two shards with an index."""
    weights = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    write_shards(single, weights)
    return single


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, of_file in parts.items():
        save_file({name: weights[name] for name in of_file}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, of_file in parts.items() for name in of_file}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in SHARDS for name, tensor in load_file(folder / file).items()}


def error_of(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_model(str(folder))
    text = str(caught.value)
    assert text.startswith(f"model {folder}: ") and "\n" not in text
    return text.removeprefix(f"model {folder}: ")


@pytest.fixture
def stale(sharded: Path) -> Path:
    """Shards with an index, and beside them other weights in all kinds of files."""
    other = {name: torch.zeros_like(tensor) for name, tensor in all_weights(sharded).items()}
    for name in (SINGLE, "consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00003.safetensors"):
        save_file(other, sharded / name, metadata={"format": "pt"})
    torch.save(other, sharded / "pytorch_model.bin")
    return sharded


@pytest.mark.parametrize("load_in", [None, "nf4"])
def test_the_index_decides_for_the_trainer(stale: Path, load_in: Any) -> None:
    expected = all_weights(stale)
    assert resolve_model(str(stale)) == str(stale)
    base = load_base(str(stale), dtype=torch.float32, load_in=load_in)
    plain = [name for name in expected if load_in is None or name not in nf4_names(str(stale))]
    assert len(plain) > 3 and all(torch.equal(base.weights[name], expected[name]) for name in plain)
    files = files_of_weights(stale)
    assert files.keys() == expected.keys() and {path.name for path in files.values()} == set(SHARDS)
    assert not hasattr(base.model.config, "transformers_weights")


def test_the_index_decides_for_exports(stale: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    expected = all_weights(stale)
    model: Any = AutoModelForCausalLM.from_pretrained(stale)
    assert not model.model.norm.weight.any(), "transformers alone reads the other file"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))  # a zero one
    merged = merge(str(stale), tmp_path / "adapter").model.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.engine
@pytest.mark.parametrize("has_index", [True, False])
def test_vllm_reads_the_same_files(stale: Path, has_index: bool) -> None:
    from rankup.grpo.update.resolve import engine_settings
    from rankup.rollout.engine import RolloutEngine

    expected = all_weights(stale)
    if not has_index:
        save_file(expected, stale / SINGLE, metadata={"format": "pt"})
        (stale / INDEX).unlink()
        for path in stale.glob("model-0*"):
            save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    config = tiny_config(stale / "unused", model=str(stale), dtype="float32", engine="vllm")
    engine = RolloutEngine(engine_settings(config, resolve_model(str(stale))))
    try:
        found = engine.base_weights()
        unpacked = [name for name in expected if "norm" in name or "embed" in name]
        assert len(unpacked) == 6 and all(torch.equal(found[name], expected[name]) for name in unpacked)
    finally:
        engine.close()


def test_without_an_index_the_single_file_is_read(single: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, single / SHARDS[0])
    assert find_weights(single).names == (SINGLE,) and find_weights(single).others == (SHARDS[0],)
    resolve_model(str(single))


def test_pickled_weights_are_still_read(single: Path) -> None:
    torch.save(load_file(single / SINGLE), single / "pytorch_model.bin")
    expected = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    base = load_base(resolve_model(str(single)), dtype=torch.float32)
    assert all(torch.equal(base.weights[name], tensor) for name, tensor in expected.items())
    (single / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(expected, "a.bin")}))
    assert error_of(single).startswith("the folder has pytorch_model.bin and pytorch_model.bin.index.json: remove the one that")


def test_what_is_missing_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    last = (sharded / SHARDS[1]).read_bytes()
    (sharded / SHARDS[1]).unlink()
    assert error_of(sharded) == f"the index names {SHARDS[1]}, which is missing: download or copy the model again"
    (sharded / SINGLE).touch()
    assert error_of(sharded).endswith(f"copy the model again, or remove {INDEX} if {SINGLE} is the model")
    (sharded / SINGLE).unlink()
    (sharded / SHARDS[1]).write_bytes(last[:-10])
    assert error_of(sharded).startswith(f"{SHARDS[1]} is damaged or missing: ")
    (sharded / SHARDS[1]).write_bytes(last)
    index["weight_map"]["model.extra.weight"] = SHARDS[1]
    (sharded / INDEX).write_text(json.dumps(index))
    assert error_of(sharded).startswith(f"the index names model.extra.weight in {SHARDS[1]}, which does not have it: ")
    del index["weight_map"]["model.extra.weight"]
    moved = next(name for name, file in index["weight_map"].items() if file == SHARDS[1])
    index["weight_map"][moved] = SHARDS[0]
    (sharded / INDEX).write_text(json.dumps(index))
    assert error_of(sharded).startswith(f"the index names {moved} in {SHARDS[0]}, which does not have it")
    for damaged in ("{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": 5}'):
        (sharded / INDEX).write_text(damaged)
        assert error_of(sharded).startswith(f"{INDEX} is damaged: ")
    (sharded / INDEX).unlink()
    assert error_of(sharded).startswith(f"the folder has no {SINGLE} and no {INDEX} (it has {SHARDS[0]}): save the model")


def test_a_weight_in_two_shards_is_ambiguous(sharded: Path) -> None:
    first = load_file(sharded / SHARDS[0])
    second = load_file(sharded / SHARDS[1])
    name = min(first)
    save_file({**second, name: first[name]}, sharded / SHARDS[1])
    assert error_of(sharded) == f"{name} is in {SHARDS[0]} and in {SHARDS[1]}: keep one of them"


def test_weights_that_the_model_has_and_its_files_have_not(single: Path) -> None:
    """transformers would draw them at random."""
    weights = load_file(single / SINGLE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, single / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"have no weight model\.layers\.1\.mlp\.up_proj\.weight, which the model has$"):
        load_base(resolve_model(str(single)), dtype=torch.float32)


# Quantized

QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ, 4 bits"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ, 4 bits"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits"),
    "8 bits": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes, 8 bits"),
    "compressed": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "older": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "nested": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "FP8"),
    "unknown": ({"quantization_config": {"of": "tomorrow"}}, "quantization_config in its config.json"),
}


def quantize(folder: Path, keys: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(("keys", "how"), QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("config_only", [False, True])
def test_a_quantized_model_is_refused_in_one_sentence(single: Path, keys: dict[str, Any], how: str, config_only: bool) -> None:
    quantize(single, keys)
    (single / SINGLE).unlink()  # nothing is read but the configuration
    with pytest.raises(ValueError) as caught:
        resolve_model(str(single), config_only=config_only)
    assert str(caught.value) == (
        f"model {single}: its weights are quantized already ({how}), and training needs the original ones: set model.name to "
        "the model that it was made from (model.load_in=nf4 rounds that one to 4 bits)"
    )


def test_files_and_types_that_tell_a_quantized_model(single: Path) -> None:
    (single / "quantize_config.json").write_text("{}")
    assert error_of(single).startswith("its weights are quantized already (it has a quantize_config.json), and training")
    (single / "quantize_config.json").unlink()
    quantize(single, {"quantization_config": None})
    resolve_model(str(single))
    weights = load_file(single / SINGLE)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(weights, single / SINGLE, metadata={"format": "pt"})
    assert "quantized already (model.layers.0.mlp.up_proj.weight is in F8_E4M3), and" in error_of(single)
