"""Lengths, token ids and stop strings that a model or its tokenizer has not, before an engine is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import FAMILIES
from families import config_of as family_config
from tiny_models import tiny_tokenizer

from rankup.rollout.config import RolloutConfig
from rankup.rollout.model_limits import (
    UNSTABLE_IN_FLOAT16,
    _cache_bytes_per_token,
    check_cache_on_cpu,
    check_model_dtype,
    check_model_limits,
    context_length,
    has_recurrent_layers,
    prompt_length,
    wider_windows,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, "rope_theta": 1e4},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LONG_ROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 4.0},
    **{"short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
}
CONFIGURATIONS: list[tuple[str, dict[str, Any], int]] = [
    ("LlamaConfig", {}, 512),
    ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
    ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 2048),
    ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 1024),
    ("LlamaConfig", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
    ("LlamaConfig", {"rope_parameters": YARN}, 512),
    ("LlamaConfig", {"rope_parameters": LLAMA3}, 512),
    ("Phi3Config", {"rope_parameters": LONG_ROPE}, 512),
    ("Qwen2Config", {}, 512),
    ("CohereConfig", {"model_max_length": 4096}, 4096),
    ("Gemma3TextConfig", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}, 512),
]  # fmt: skip


def config_of(name: str, options: dict[str, Any]) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512, "head_dim": 32}
    return getattr(transformers, name)(**sizes, **options)


def test_the_models_that_vllm_refuses_in_float16_are_refused_before(tiny_model_path) -> None:
    from vllm.config.model import _FLOAT16_NOT_SUPPORTED_MODELS

    assert set(_FLOAT16_NOT_SUPPORTED_MODELS) == UNSTABLE_IN_FLOAT16
    with pytest.raises(ValueError, match=r"^model.dtype=float16: gemma2 models .* set bfloat16 or float32$"):
        check_model_dtype(str(tiny_model_path("gemma2")), "float16")
    check_model_dtype(str(tiny_model_path("gemma2")), "bfloat16")
    check_model_dtype(str(tiny_model_path("llama")), "float16")


def make_config(folder: Path, family: str) -> str:
    """The folder of a model's configuration, without weights."""
    family_config(family).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-vision", "qwen3-next"])
def test_delta_nets_need_bfloat16_with_vllm_on_cpu(tmp_path: Path, family: str) -> None:
    model = make_config(tmp_path, family)
    with pytest.raises(ValueError, match=r"^model.dtype=float32: on CPU vLLM computes the gated delta nets of .* set it, or "):
        check_model_dtype(model, "float32", vllm_on_cpu=True)
    check_model_dtype(model, "float32")
    check_model_dtype(model, "bfloat16", vllm_on_cpu=True)


def test_windows_that_vllm_takes_for_wider_are_noted_if_sequences_reach_them(tmp_path: Path) -> None:
    transformers.Cohere2Config(sliding_window=64).save_pretrained(tmp_path)
    longer, shorter = (RolloutConfig(max_prompt_length=40, max_completion_length=n) for n in (30, 20))
    (note,) = wider_windows(str(tmp_path), longer)
    assert "windows of cohere2 have one token more than transformers' 64" in note
    transformers.Cohere2Config(sliding_window=None, layer_types=["full_attention"] * 40).save_pretrained(tmp_path / "full")
    assert [*wider_windows(str(tmp_path / "full"), longer)] == []
    of_torch = longer.model_copy(update={"engine": "torch"})
    assert [*wider_windows(str(tmp_path), shorter), *wider_windows(str(tmp_path), of_torch)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_which_models_keep_a_state(tmp_path: Path, family: str) -> None:
    recurrent = {"qwen3-next", "qwen3.5", "qwen3.5-vision", "granite4-hybrid", "nemotron-h", "lfm2"}
    assert has_recurrent_layers(make_config(tmp_path, family)) == (family in recurrent)


@pytest.mark.parametrize(("name", "options", "expected"), CONFIGURATIONS)
def test_the_context_is_that_of_the_configuration_with_rope_scaling(name: str, options: dict[str, Any], expected: int) -> None:
    assert context_length(config_of(name, options)) == expected


def test_gpt2_has_another_name_for_it_and_some_models_have_none() -> None:
    assert context_length(transformers.GPT2Config(n_positions=99)) == 99
    assert context_length(transformers.BloomConfig()) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "expected"), CONFIGURATIONS)
def test_the_context_is_vllms(name: str, options: dict[str, Any], expected: int) -> None:
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import patch_rope_parameters
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = config_of(name, options)
    patch_rope_parameters(config)
    arch: Any = type("Arch", (), {})()
    arch.derived_max_model_len_and_key = ModelArchConfigConvertorBase(config, config).derive_max_model_len_and_key()

    def verified(length: int) -> int:
        return _get_and_verify_max_len(config, arch, None, length, False, None)

    assert verified(expected) == expected
    with pytest.raises(ValueError, match="max_model_len"):
        verified(expected + 1)


@pytest.fixture
def model(tiny_model_path) -> str:
    return str(tiny_model_path("llama"))


def rollout(**options: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({"max_prompt_length": 100, "max_completion_length": 20, **options})


def test_sequences_longer_than_the_context_are_refused_by_both_options(model: str) -> None:
    check_model_limits(rollout(max_prompt_length=500, max_completion_length=12), model, tiny_tokenizer())
    with pytest.raises(ValueError) as caught:
        check_model_limits(rollout(max_prompt_length=500, max_completion_length=13), model, tiny_tokenizer())
    assert str(caught.value) == (
        "rollout.max_prompt_length + rollout.max_completion_length: must be at most 512, the context of the model "
        "(got 500 + 13 = 513): lower one of them"
    )


@pytest.mark.parametrize(("options", "expected"), [
    ({"max_completion_length": 12}, 500), ({"max_completion_length": 9}, 503), ({"max_completion_length": 600}, 512),
    ({"max_completion_length": 12, "max_prompt_length": 512}, 512),
])  # fmt: skip
def test_the_default_of_the_longest_prompt_is_what_the_context_leaves(
    model: str, options: dict[str, int], expected: int
) -> None:
    assert prompt_length(RolloutConfig.model_validate(options), model) == expected


def test_a_scaled_model_has_room_for_longer_ones(model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    check_model_limits(rollout(max_prompt_length=1000), str(folder), tiny_tokenizer())


@pytest.mark.parametrize(("kind", "bytes_per_token"), [("llama", 1024), ("qwen2", 1024), ("qwen3", 1024), ("mistral", 0)])
def test_a_cache_without_room_for_a_sequence_is_refused(tiny_model_path, kind: str, bytes_per_token: int) -> None:
    """2 layers of 2 heads of 32, keys and values in fp32; a model with a window may keep fewer."""
    path, gib = str(tiny_model_path(kind)), 128 * 1024 / 2**30
    for length, fits in ((128, True), (129, not bytes_per_token)):
        sizes = rollout(max_prompt_length=length - 20, kv_cache_gib=gib)
        if fits:
            check_cache_on_cpu(sizes, path, dtype="float32", block=32)
            continue
        with pytest.raises(ValueError, match=r"a sequence of 129 tokens .* raise rollout\.kv_cache_gib, .* at most 128 tokens"):
            check_cache_on_cpu(sizes, path, dtype="float32", block=32)
        check_cache_on_cpu(sizes, path, dtype="bfloat16", block=32)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_cache_of_vllm_has_as_many_tokens(make_engine, tiny_model_path, kind: str) -> None:
    engine = make_engine(kind)
    cache = engine._engine.vllm_config.cache_config
    config = transformers.AutoConfig.from_pretrained(tiny_model_path(kind))
    of_a_block = _cache_bytes_per_token(config, "float32") * cache.block_size
    assert cache.num_gpu_blocks == int(engine.settings.rollout.kv_cache_gib * 2**30) // of_a_block


@pytest.mark.parametrize("kwargs", [{"stop_token_ids": [1, 260]}, {"allowed_token_ids": [260]}, {"logit_bias": {260: 1.0}}])
def test_token_ids_outside_of_the_vocabulary_are_refused(model: str, kwargs: dict[str, Any]) -> None:
    (name,) = kwargs
    with pytest.raises(ValueError, match=rf"^rollout\.generation_kwargs\.{name}: must be token ids below 260.*got 260"):
        check_model_limits(rollout(generation_kwargs=kwargs), model, tiny_tokenizer())


@pytest.mark.parametrize("stop", ["<eos>\n", "a<unk>", "<eos><eos>"])
def test_a_stop_string_around_a_special_token_is_refused_unless_the_text_has_those(model: str, stop: str) -> None:
    with pytest.raises(ValueError, match=r"^rollout\.stop: '.*' has the special token '<.*>' in it, which is left out"):
        check_model_limits(rollout(stop=["ok", stop]), model, tiny_tokenizer())
    check_model_limits(rollout(stop=["ok", stop], skip_special_tokens=False), model, tiny_tokenizer())


@pytest.mark.parametrize("stop", ["<eos>", "<unk>", "</answer>", "<", "eos"])
def test_a_special_token_alone_or_a_part_of_its_name_is_a_stop_string(model: str, stop: str) -> None:
    check_model_limits(rollout(stop=stop), model, tiny_tokenizer())
