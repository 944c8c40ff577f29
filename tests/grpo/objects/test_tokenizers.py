"""A `processing_class` that encodes and decodes otherwise than the model's tokenizer is saved and becomes `model.tokenizer`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from rankup import GRPOConfig
from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.objects.given import Given, from_objects

Load = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def load(tiny_model_path) -> Load:
    return lambda **options: AutoTokenizer.from_pretrained(tiny_model_path("llama"), **options)


@pytest.fixture
def given(tiny_model_path) -> Callable[..., Given]:
    def make(tokenizer: Any, config: GRPOConfig | None = None) -> Given:
        return from_objects(config or GRPOConfig(), model=str(tiny_model_path("llama")), processing_class=tokenizer)

    return make


def test_the_models_own_tokenizer_changes_nothing(load: Load, given, cache: Path):
    found = given(load())
    assert found.config.model.tokenizer is None and found.notes == () and not cache.exists()


def test_sides_padding_token_and_state_do_not_matter(load: Load, given, cache: Path):
    tokenizer = load(padding_side="left", truncation_side="left", model_max_length=77)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)  # which the object remembers
    assert given(tokenizer).config.model.tokenizer is None and not cache.exists()


@pytest.mark.slow
def test_a_real_tokenizer_is_recognised(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME")  # the converted model is in the user's
    name = "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), padding_side="left")
    assert from_objects(GRPOConfig(), model=name, processing_class=tokenizer).config.model.tokenizer is None


def other_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}!"


def other_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = "<unk>"


def other_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["A"]})


def other_normaliser(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("change", [other_template, other_eos, other_special_token, other_normaliser])
def test_another_tokenizer_is_saved_once(change: Callable[[Any], None], load: Load, given, cache: Path):
    tokenizer, again = load(), load()
    change(tokenizer)
    change(again)
    found = given(tokenizer)
    folder = Path(found.config.model.tokenizer)
    assert folder.parent == cache / "tokenizers" and given(again).config.model.tokenizer == str(folder)
    assert found.config.notes == (f"processing_class: differs from the model's tokenizer, so it is saved in {folder}",)
    saved = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "An Apple"}]
    assert saved.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode("An Apple")
    assert saved.encode("An Apple") == ids
    assert saved.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    assert saved.eos_token_id == tokenizer.eos_token_id


def test_an_object_wins_over_the_option(load: Load, given):
    assert given(load(), GRPOConfig(tokenizer="some/tokenizer")).config.model.tokenizer is None


def test_a_padding_token_of_its_own_is_a_new_token(load: Load, given):
    tokenizer = load()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match=r"has 260 embeddings, and token '<padding>' has the id 260: call model.resize"):
        given(tokenizer)


def test_tokens_that_the_models_own_tokenizer_has_too_need_no_embedding(load: Load, tiny_model_path, tmp_path: Path):
    """As with Gemma 3, whose text models have no embedding for the token of images."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_path("llama"), folder)
    own = load()
    own.add_tokens(["<image>"], special_tokens=True)
    own.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other_template(tokenizer)
    config = from_objects(GRPOConfig(), model=str(folder), processing_class=tokenizer).config
    assert config.model.tokenizer is not None
    tokenizer.add_tokens(["<video>"])
    with pytest.raises(ValueError, match="token '<video>' has the id 261"):
        from_objects(GRPOConfig(), model=str(folder), processing_class=tokenizer)


def test_a_tokenizer_for_a_folder_without_one(tiny_model_path, tmp_path: Path, load: Load):
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(tiny_model_path("llama") / file, tmp_path)
    config = from_objects(GRPOConfig(), model=str(tmp_path), processing_class=load()).config
    assert AutoTokenizer.from_pretrained(config.model.tokenizer).encode("a b") == load().encode("a b")


def test_only_the_tokenizer_of_a_processor_is_used(load: Load, given):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    found = given(Processor(load()))
    assert found.config.model.tokenizer is None
    assert found.notes == ("processing_class: only the processor's tokenizer is used; prompts are text",)
    with pytest.raises(TypeError, match=r"processing_class must be .* \(got Processor\)"):
        given(Processor(None))
    with pytest.raises(TypeError, match=r"processing_class must be .* \(got str\)"):
        given("some/tokenizer")


def test_a_tokenizer_that_changes_when_it_is_saved_is_refused(given):
    class Mine(PreTrainedTokenizerFast):
        def encode(self, *_: Any, **__: Any) -> list[int]:
            return [5]

    tokenizer = Mine(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<eos>")
    with pytest.raises(ValueError, match="is another tokenizer once it is saved and loaded: save it yourself"):
        given(tokenizer)
