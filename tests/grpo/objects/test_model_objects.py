"""A model object becomes the folder that it came from if it is unchanged, else one in the cache that has the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rankup import GRPOConfig
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.objects.given import Given, from_objects

Load = Callable[..., PreTrainedModel]
Logits = Callable[..., torch.Tensor]


def given_of(model: Any, config: GRPOConfig | None = None, **arguments: Any) -> Given:
    return from_objects(config or GRPOConfig(), model=model, **arguments)


def change(model: PreTrainedModel) -> None:
    """One weight of the last layer, by little."""
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] += 1e-3


def saved_models(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").glob("*") if path.is_dir())


# ------------------------------------------------------------------------------------------------- unchanged objects


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_an_unchanged_object_is_its_own_folder(kind: str, load_model: Load, tiny_model_path, cache: Path):
    given = given_of(load_model(kind))
    model = given.config.model
    assert (model.name, model.revision, model.dtype) == (str(tiny_model_path(kind)), None, "float32")
    assert not cache.exists() and given.notes == ()


def test_an_object_in_another_dtype_is_its_own_folder_in_that_dtype(load_model: Load, tiny_model_path, cache: Path):
    for dtype in ("bfloat16", "float16"):
        model = given_of(load_model(dtype=getattr(torch, dtype))).config.model
        assert (model.name, model.dtype) == (str(tiny_model_path("llama")), dtype)
    assert not cache.exists()


def test_what_does_not_change_the_function_needs_no_copy(load_model: Load, tiny_model_path, cache: Path):
    model = load_model()
    model.config.pad_token_id = 2
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.set_attn_implementation("eager")
    assert given_of(model).config.model.name == str(tiny_model_path("llama"))
    assert not cache.exists()


def test_a_model_in_several_files_is_compared_too(load_model: Load, tiny_model_path, tmp_path: Path, cache: Path):
    with quiet_stderr():
        load_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_model_path("llama")).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert given_of(model).config.model.name == str(tmp_path / "sharded")
    change(model)
    assert given_of(model).config.model.name.startswith(str(cache))


def test_a_model_of_the_hub_is_its_cached_commit(
    load_model: Load, tiny_model_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    for commit, kind in (("a" * 40, "qwen3"), ("b" * 40, "llama"), ("c" * 40, "llama")):
        shutil.copytree(tiny_model_path(kind), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load_model()
    model.name_or_path = "some/model"
    found = given_of(model).config.model
    assert (found.name, found.revision) == ("some/model", "c" * 40)
    assert not cache.exists()


# --------------------------------------------------------------------------------------------------- changed objects


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_changed_object_is_saved_with_the_same_logits(kind: str, load_model: Load, logits: Logits, cache: Path):
    model = load_model(kind)
    change(model)
    given = given_of(model)
    folder = Path(given.config.model.name)
    assert folder.is_relative_to(cache / "models") and given.config.model.dtype == "float32"
    assert torch.equal(logits(folder), logits(model))
    (note,) = given.config.notes
    assert str(folder) in note and "MiB" in note and note.startswith("model: the object differs from the files of ")
    assert AutoTokenizer.from_pretrained(folder).encode("as before") == AutoTokenizer.from_pretrained(
        model.name_or_path
    ).encode("as before")


def test_the_same_object_gives_the_same_folder_and_another_one_another(load_model: Load, cache: Path):
    names = []
    for shift in (1.0, 1.0, 2.0):
        model = load_model()
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[0] += shift
        names.append(given_of(model).config.model.name)
    assert names[0] == names[1] != names[2]
    assert len(saved_models(cache)) == 2


def test_saving_is_not_repeated(load_model: Load, cache: Path):
    model = load_model()
    change(model)
    (cache_file,) = [path / "model.safetensors" for path in [Path(given_of(model).config.model.name)]]
    written = cache_file.stat().st_mtime_ns
    given_of(model)
    assert cache_file.stat().st_mtime_ns == written


def test_a_changed_configuration_is_a_change(load_model: Load, logits: Logits, cache: Path):
    model = load_model()
    model.config.rms_norm_eps = 1e-2
    changed = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    changed.load_state_dict(model.state_dict())
    changed.name_or_path = model.name_or_path
    folder = given_of(changed).config.model.name
    assert folder.startswith(str(cache))
    assert AutoConfig.from_pretrained(folder).rms_norm_eps == 1e-2
    assert torch.equal(logits(folder), logits(changed.eval()))


def test_other_ends_of_completions_are_a_change(load_model: Load, cache: Path):
    model = load_model()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [2, 17]
    folder = Path(given_of(model).config.model.name)
    assert folder.is_relative_to(cache)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 17]


def test_a_generation_config_that_transformers_refuses_to_save_is_kept(load_model: Load):
    model = load_model()
    change(model)
    assert model.generation_config is not None
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained("unused")
    folder = Path(given_of(model).config.model.name)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_new_model_without_files_is_saved(logits: Logits, tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    given = given_of(model, processing_class=tokenizer)
    assert torch.equal(logits(given.config.model.name), logits(model))
    assert "LlamaForCausalLM-" in given.config.model.name
    assert given.notes[0].startswith("model: the object has no files: saved in ")
    assert given.config.model.tokenizer is None  # the folder has it


def test_untied_weights_are_saved_as_such(load_model: Load, logits: Logits):
    model = load_model("qwen2")
    head = model.get_output_embeddings()
    assert head is not None and model.config.tie_word_embeddings
    head.weight = torch.nn.Parameter(head.weight.detach() * 0.5)
    folder = given_of(model).config.model.name
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is False  # else vLLM would tie them
    assert torch.equal(logits(folder), logits(model))
    assert model.config.tie_word_embeddings


def test_weights_that_share_memory_against_the_configuration_are_saved_twice(load_model: Load, logits: Logits):
    model = load_model("qwen3")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head is not None and not model.config.tie_word_embeddings
    head.weight = embedding.weight
    folder = given_of(model).config.model.name
    assert torch.equal(logits(folder), logits(model))


def test_new_tokens_are_a_change(load_model: Load, logits: Logits, tiny_model_path):
    model, tokenizer = load_model("qwen2"), AutoTokenizer.from_pretrained(tiny_model_path("qwen2"))
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    with quiet_stderr():
        model.resize_token_embeddings(len(tokenizer))
    given = given_of(model, processing_class=tokenizer)
    folder = given.config.model.name
    assert AutoTokenizer.from_pretrained(folder).encode("<think>") == [len(tokenizer) - 1]
    assert torch.equal(logits(folder), logits(model))
    assert given.config.model.tokenizer is None


def test_new_tokens_without_embeddings_are_refused(load_model: Load, tiny_model_path, cache: Path):
    model, tokenizer = load_model(), AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    change(model)
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"the model has 260 embeddings, and token '<think>' has the id 260"):
        given_of(model, processing_class=tokenizer)
    assert saved_models(cache) == []


def test_a_processing_class_wins_over_the_option(load_model: Load, tiny_model_path):
    model = load_model()
    change(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    given = given_of(model, GRPOConfig(tokenizer="some/tokenizer"), processing_class=tokenizer)
    assert given.config.model.tokenizer is None


def test_the_same_model_with_another_tokenizer_is_another_folder(load_model: Load, tiny_model_path):
    model, tokenizer = load_model(), AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    change(model)
    alone = given_of(model).config.model.name
    tokenizer.chat_template = "{{ messages[0].content }}"
    folder = given_of(model, processing_class=tokenizer).config.model.name
    assert folder != alone and AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert given_of(model).config.model.name == alone


def test_the_object_is_not_modified(load_model: Load):
    model = load_model("qwen2")
    change(model)
    handle = model.register_forward_hook(lambda *_: None)
    model.train()
    config, generation = model.config.to_dict(), model.generation_config.to_dict()  # type: ignore[union-attr]
    weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    given_of(model)
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation  # type: ignore[union-attr]
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(after[name].data_ptr() == at and torch.equal(after[name], value) for name, (at, value) in weights.items())
    assert handle.id in model._forward_hooks and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_left_behind_if_saving_fails(load_model: Load, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    model = load_model()
    change(model)
    monkeypatch.setattr("rankup.grpo.objects.base.write_tokenizer", full_disk)
    with pytest.raises(OSError, match="No space left"):
        given_of(model)
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []


# --------------------------------------------------------------------------------------------- the configuration


def test_a_dtype_that_is_set_wins_and_is_noted(load_model: Load, tiny_model_path, cache: Path):
    given = given_of(load_model(), GRPOConfig(bf16=True))
    assert (given.config.model.name, given.config.model.dtype) == (str(tiny_model_path("llama")), "bfloat16")
    assert given.notes == ("model: its weights are in float32, and training uses them in bfloat16 (model.dtype)",)


def test_rounded_weights_are_not_those_of_a_wider_file(load_model: Load, logits: Logits, cache: Path):
    """Read in float32, the files have more digits than the object."""
    model = load_model(dtype=torch.bfloat16)
    folder = given_of(model, GRPOConfig(dtype="float32")).config.model.name
    assert folder.startswith(str(cache))
    assert torch.equal(logits(folder), logits(load_model(dtype=torch.bfloat16).float()))


def test_other_options_and_notes_are_kept(load_model: Load):
    config = GRPOConfig(rank=16, per_device_train_batch_size=8, disable_tqdm=True, bf16_full_eval=True, model="other")
    given = given_of(load_model(), config)
    assert (given.config.lora, given.config.optim, given.config.has_trl_batch) == (config.lora, config.optim, True)
    assert given.config.notes == (*config.notes, *given.notes)
    assert "other" not in given.config.model.name


def test_a_name_is_as_it_was(cache: Path):
    config = GRPOConfig(model={"name": "other", "revision": "v2"})
    given = given_of("some/model", config)
    assert (given.config.model.name, given.config.model.revision, given.notes) == ("some/model", "v2", ())
    assert from_objects(config).config == config


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_model_that_is_no_causal_language_model_is_refused(load_model: Load, tiny_model_path):
    with quiet_stderr():
        classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_path("llama"), num_labels=1)
    with pytest.raises(ValueError, match=r"a LlamaForSequenceClassification is not a causal language model"):
        given_of(classifier)

    class Mine(LlamaForCausalLM):
        """A forward that no file has."""

    with pytest.raises(ValueError, match=r"a Mine is not a causal language model"):
        given_of(Mine(load_model().config))
    with pytest.raises(TypeError, match=r"model must be a name, .* \(got Linear\)"):
        given_of(torch.nn.Linear(2, 2))


def test_weights_that_are_not_in_memory_are_refused(load_model: Load):
    config = load_model().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="not in memory"):
        given_of(model)


def test_other_dtypes_are_refused(load_model: Load):
    with pytest.raises(ValueError, match="float64 weights are not supported"):
        given_of(load_model().to(torch.float64))  # type: ignore[arg-type]


def test_several_dtypes_are_refused(load_model: Load):
    model = load_model("qwen3")
    model.get_output_embeddings().to(torch.bfloat16)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"weights in bfloat16 and float32: cast them to one dtype"):
        given_of(model)


def test_further_weights_are_refused(load_model: Load):
    model = load_model()
    model.value_head = torch.nn.Linear(96, 1)
    with pytest.raises(ValueError, match=r"do not fit its class LlamaForCausalLM and its config, see value_head.bias"):
        given_of(model)


def test_a_model_without_a_tokenizer_needs_a_processing_class(load_model: Load, tmp_path: Path, tiny_model_path):
    model = load_model()
    with quiet_stderr():
        model.save_pretrained(tmp_path / "bare")
        bare = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no tokenizer, which sampling needs: pass processing_class"):
        given_of(bare)
    tokenizer = str(tiny_model_path("llama"))
    assert given_of(bare, GRPOConfig(tokenizer=tokenizer)).config.model.tokenizer == tokenizer
    change(bare)
    with pytest.raises(ValueError, match=r"bare has no tokenizer, which sampling needs: pass processing_class"):
        given_of(bare)
    assert given_of(bare, processing_class=AutoTokenizer.from_pretrained(tokenizer)).config.model.tokenizer is None
