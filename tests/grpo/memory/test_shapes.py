"""Shapes and parameter counts: exact for the public models of the tables, for tiny models of each family, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import public_configs
import pytest
import torch
from families import FAMILIES
from families import config_of as family_config

from rankup.grpo.memory.shapes import ModelShape, read_shape
from rankup.rollout.model_classes import auto_class, build_model

# Of the public configurations: layers, hidden, MLP, heads, key heads, head dimension, vocabulary, tied; and what follows.
Row = tuple[str, int, int, int, int, int, int | None, int, bool]
PUBLIC: dict[str, Row] = {
    "SmolLM2-135M": ("llama", 30, 576, 1536, 9, 3, None, 49152, True),
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 2, None, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, None, 151936, True),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 28, 4, None, 152064, False),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, None, 128256, False),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
}
PER_RANK = {
    "SmolLM2-135M": 305_280,
    "Qwen2.5-0.5B": 549_888,
    "Qwen2.5-1.5B": 1_154_048,
    "Qwen2.5-7B": 2_523_136,
    "Llama-3.1-8B": 2_621_440,
    "Qwen3-8B": 2_727_936,
}
ADAPTERS = {
    "SmolLM2-135M": {16: 4_884_480, 64: 19_537_920, 128: 39_075_840},
    "Qwen2.5-0.5B": {16: 8_798_208, 64: 35_192_832, 128: 70_385_664},
    "Qwen2.5-1.5B": {16: 18_464_768, 64: 73_859_072, 128: 147_718_144},
    "Qwen2.5-7B": {16: 40_370_176, 64: 161_480_704, 128: 322_961_408},
    "Llama-3.1-8B": {16: 41_943_040, 64: 167_772_160, 128: 335_544_320},
    "Qwen3-8B": {16: 43_646_976, 64: 174_587_904, 128: 349_175_808},
}
BASES = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
}


def config_of(row: Row) -> dict[str, Any]:
    model_type, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, tied = row
    keys = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    return keys if head_dim is None else keys | {"head_dim": head_dim}


@pytest.fixture(scope="module")
def public_shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelShape]:
    """A function from a name in `PUBLIC` to its shape."""
    shapes: dict[str, ModelShape] = {}

    def shape(name: str) -> ModelShape:
        if name not in shapes:
            folder = tmp_path_factory.mktemp(name)
            (folder / "config.json").write_text(json.dumps(config_of(PUBLIC[name])))
            shapes[name] = read_shape(str(folder))
        return shapes[name]

    return shape


@pytest.mark.parametrize("name", PUBLIC)
def test_the_tables_adapter_parameters_are_reproduced_to_the_unit(public_shape: Callable[[str], ModelShape], name: str):
    per_rank = public_shape(name).parameters_per_rank("all-linear")
    assert per_rank == PER_RANK[name]
    assert {rank: rank * per_rank for rank in (16, 64, 128)} == ADAPTERS[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_base_parameters_are_those_of_the_public_model(public_shape: Callable[[str], ModelShape], name: str):
    assert public_shape(name).parameters == BASES[name]


@pytest.mark.parametrize("name", public_configs.CONFIGS)
def test_parameters_of_models_with_experts_towers_and_delta_nets(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text(json.dumps(public_configs.CONFIGS[name]))
    shape = read_shape(str(tmp_path))
    if name in public_configs.BASES:
        assert shape.parameters == public_configs.BASES[name]
    assert shape.parameters_per_rank("attention") == public_configs.ATTENTION[name]
    assert shape.parameters_per_rank("all-linear") == public_configs.ATTENTION[name] + public_configs.MLPS[name]
    assert not any(note.startswith("each prompt is computed once per completion") for note in shape.notes)


def test_sizes_are_read_off(public_shape: Callable[[str], ModelShape]):
    shape = public_shape("Qwen2.5-0.5B")
    assert (shape.layers, shape.hidden, shape.intermediate) == (24, 896, 4864)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary) == (14, 2, 64, 151936)
    assert shape.tied
    assert shape.biases == ("q_proj", "k_proj", "v_proj")
    assert public_shape("Qwen3-8B").head_dim == 128
    assert public_shape("Llama-3.1-8B").biases == ()


def test_the_common_shortcut_would_be_off(public_shape: Callable[[str], ModelShape]):
    shape = public_shape("Qwen2.5-7B")
    shortcut = 2 * 16 * shape.hidden * 7 * shape.layers
    assert shortcut < 0.6 * 16 * shape.parameters_per_rank("all-linear")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig", "Gemma3TextConfig"])
def test_counts_are_those_of_the_built_model(tmp_path: Path, kind: str, tied: bool):
    import transformers

    config = getattr(transformers, kind)(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    shape = read_shape(str(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tied == tied
    weights = [module.weight for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    assert shape.parameters_per_rank(["q_proj", "down_proj"]) == sum(sum(weight.shape) for weight in weights)


def test_targets_may_be_names_an_expression_the_head_and_the_embedding(public_shape: Callable[[str], ModelShape]):
    shape = public_shape("SmolLM2-135M")
    assert shape.parameters_per_rank("qkv") == 30 * (3 * 576 + 576 + 2 * 192)
    assert shape.parameters_per_rank(["self_attn.q_proj"]) == 30 * (576 + 576)
    assert shape.parameters_per_rank(r".*layers\.(0|1)\..*q_proj") == 2 * (576 + 576)
    assert shape.parameters_per_rank(["lm_head"]) == shape.parameters_per_rank(["embed_tokens"]) == 576 + 49152


@pytest.mark.parametrize("targets", [["q_proj", "wq"], r".*\.wq"])
def test_a_target_that_fits_nothing_is_refused(public_shape: Callable[[str], ModelShape], targets: str | list[str]):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layer .*wq; name some of .*, q_proj, "):
        public_shape("SmolLM2-135M").targeted(targets)


def test_layers_with_the_same_adapters_are_distinguished_from_others(public_shape: Callable[[str], ModelShape]):
    shape = public_shape("SmolLM2-135M")
    assert all(shape.has_like_layers(targets) for targets in ("all-linear", ["q_proj", "lm_head"]))
    assert not any(shape.has_like_layers(targets) for targets in (r".*layers\.(0|1)\..*q_proj", ["lm_head"]))


def test_experts_are_measured_as_one_mlp(tmp_path: Path):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    moe = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(moe))
    shape = read_shape(str(tmp_path))
    assert "experts" in shape.notes[0]
    assert shape.measured_config == {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8, **sizes}


def test_attention_of_its_own_is_why_prompts_are_not_shared(tmp_path: Path):
    keys = config_of(("jamba", 2, 32, 48, 4, 2, None, 50, False))
    keys |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    notes = read_shape(str(tmp_path)).notes
    assert any(note == "each prompt is computed once per completion (its attention cannot be replaced)" for note in notes)


def test_a_window_does_not_keep_prompts_from_being_shared(tmp_path: Path):
    keys = config_of(("mistral", 2, 32, 48, 4, 2, None, 50, False)) | {"sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert not read_shape(str(tmp_path)).notes


BAD = {
    "no mapping": ("[]", "is no mapping"),
    "no JSON": ("{", "is no JSON"),
    "no model type": ('{"hidden_size": 32, "num_hidden_layers": 2}', "lacks model_type"),
    "unknown type": ('{"model_type": "no-such-type", "hidden_size": 32, "num_hidden_layers": 2}', "no-such-type"),
    "no sizes": ('{"model_type": "llama", "hidden_size": 32}', "lacks num_hidden_layers"),
    "no language model": ('{"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2}', "no model that can be planned"),
}


@pytest.mark.parametrize(("text", "part"), BAD.values(), ids=BAD)
def test_a_wrong_config_is_one_line(tmp_path: Path, text: str, part: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_shape(str(tmp_path))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"model {tmp_path}: ") and part in line


@pytest.mark.parametrize(
    ("name", "part"), [("./nowhere", "no such folder"), ("not a name", "nor an id on the Hub"), ("nobody/no-such-model", "Hub")]
)
def test_no_such_model_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, part: str):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        read_shape(name)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"model {name}: ") and part in line


def test_of_layers_with_heads_of_several_widths_the_widest_counts(tmp_path: Path):
    family_config("gemma4").save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)).head_dim == 64


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.tower is not None])
def test_of_a_checkpoint_with_a_vision_tower_the_text_part_is_counted(tmp_path: Path, family: str):
    config = family_config(family)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    with torch.device("meta"):
        text, complete = build_model(config), auto_class(config).from_config(config)
    assert shape.parameters == text.num_parameters() < complete.num_parameters()
    assert shape.layers == 2 and all(".language_model." in matrix.name or matrix.name == "lm_head" for matrix in shape.matrices)
    assert "its text part is trained and counted; its tower (0M parameters) is not loaded" in shape.notes
