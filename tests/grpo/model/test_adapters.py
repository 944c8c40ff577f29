"""PEFT's side of the policy: targets, patterns, inits, and whether saved adapters compute the same function in PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.adapters import inject
from rankup.grpo.model.lora_layers import FusedLoRAEmbedding, FusedLoRALayer
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.targets import check_targets, find_targets, target_module_names

PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
EMBEDDING = "model.embed_tokens"
Q_OF_0 = "model.layers.0.self_attn.q_proj"
Q_OF_0_AND_MLP_OF_1 = r"model\.layers\.0\.self_attn\.q_proj|.*layers\.1\.mlp\.\w+_proj"


def tiny_llama(*, layers: int = 2) -> PreTrainedModel:
    config = LlamaConfig(
        **{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "pad_token_id": 0},
    )
    return LlamaForCausalLM(config)


def injected(lora: LoraConfig, *, seed: int = 0, layers: int = 2) -> dict[str, FusedLoRALayer]:
    model = tiny_llama(layers=layers)
    inject(model, lora, seed)
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALayer)}


# Targets


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "targets",
    [
        *("qkv", "all-linear", ["q_proj", "lm_head"], ["mlp.up_proj", "layers.1.self_attn.k_proj"], ["0.mlp.down_proj"]),
        *(Q_OF_0_AND_MLP_OF_1, ".*_proj|lm_head", "lm_head|.*layers.1.*proj", r".*\.1\..*(up|down)_proj"),
        *(["embed_tokens"], ["q_proj", "model.embed_tokens", "lm_head"], r".*embed_tokens|.*q_proj"),
    ],
)
def test_adapters_are_where_stock_peft_puts_them(targets: str | list[str]) -> None:
    lora = LoraConfig(targets=targets, rank=4)
    model = tiny_llama(layers=11)  # a layer 10, whose name ends as that of layer 0
    names = find_targets(model, targets).names
    stock: Any = get_peft_model(model, PeftLoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    assert set(injected(lora, layers=11)) == set(stock.base_model.targeted_module_names)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "w_proj"], "LlamaForCausalLM has no layer w_proj"),
        (["proj"], "LlamaForCausalLM has no layer proj"),
        ("q_.*", r"LlamaForCausalLM has no layer q_\.\*"),
        (".*mlp", r"model\.layers\.0\.mlp, model\.layers\.1\.mlp cannot be adapted: only linear layers and the"),
        (".*", r"model, model\.layers, model\.layers\.0 and \d+ more cannot be adapted: only"),
        (["q_proj", "norm"], r"model\.norm cannot be adapted: LoRA does not apply to norm layers, .*; remove them"),
        (".*layernorm", r"model\.layers\.0\.input_layernorm, .* and 1 more cannot be adapted: LoRA does not apply"),
    ],
)
def test_targets_that_cannot_be_adapted(targets: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^lora.targets: {message}"):
        check_targets(tiny_llama(), targets)


def test_only_the_input_embedding_can_be_adapted() -> None:
    """GPT-2's embedding of positions is one too."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    check_targets(model, ["wte"])
    with pytest.raises(ValueError, match=r"^lora.targets: transformer\.wpe cannot be adapted: only linear layers and"):
        check_targets(model, ["wte", "wpe"])


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("qkv", ("q_proj", "k_proj", "v_proj")),
        (["self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"], ("q_proj", "up_proj")),
        (Q_OF_0_AND_MLP_OF_1, ("q_proj", "gate_proj", "up_proj", "down_proj")),
        ("lm_head|.*o_proj", ("o_proj", "lm_head")),
        (".*embed_tokens|.*o_proj", ("embed_tokens", "o_proj")),
    ],
)
def test_names_of_the_targets_for_vllm(tiny_model_path, targets: str | list[str], names: tuple[str, ...]) -> None:
    assert target_module_names(str(tiny_model_path("llama")), targets) == names


def test_an_expression_without_a_match_is_an_error_before_a_model_is_loaded(tiny_model_path) -> None:
    with pytest.raises(ValueError, match=r"^lora.targets: LlamaForCausalLM has no layer layers\.7\.\.\*; name some of "):
        target_module_names(str(tiny_model_path("llama")), "layers.7..*")


# Ranks and scales


def test_patterns_set_rank_and_scale() -> None:
    lora = LoraConfig(
        rank=8, alpha=4, rank_pattern={r"layers\.0\.mlp\..*": 2, "up_proj": 6}, alpha_pattern={"(up)_proj": 3, ".*1.*": 16}
    )
    layers = injected(lora)
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    expected = {}
    for name in PROJECTIONS:
        expected[f"model.layers.0.{name}"] = (2, 4 / 2) if "mlp" in name else (8, 4 / 8)
        expected[f"model.layers.1.{name}"] = (8, 16 / 8)
    expected["model.layers.0.mlp.up_proj"] = (2, 3 / 2)  # of the keys that fit, the first counts
    expected["model.layers.1.mlp.up_proj"] = (6, 3 / 6)
    assert found == expected
    assert all(layer.master_a.shape[0] == layer.r["default"] == layer.master_b.shape[1] for layer in layers.values())


@settings(deadline=None, max_examples=15)
@given(rank=st.integers(1, 9), other=st.integers(1, 9), alpha=st.sampled_from([1.0, 2.5, 40.0]), use_rslora=st.booleans())
def test_the_scale_depends_on_the_rank_of_the_layer(rank: int, other: int, alpha: float, use_rslora: bool) -> None:
    layers = injected(LoraConfig(rank=rank, alpha=alpha, use_rslora=use_rslora, rank_pattern={"q_proj": other}), layers=1)
    for name, layer in layers.items():
        own_rank = other if name == Q_OF_0 else rank
        assert layer.scaling["default"] == alpha / (own_rank**0.5 if use_rslora else own_rank)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "idle"),
    [
        ({"q_proj": 4, "w_proj": 2}, "w_proj"),
        ({"layers.2.self_attn.q_proj": 4}, r"layers\.2\.self_attn\.q_proj"),
        ({"up_proj": 4}, "up_proj"),  # there, but no target
        ({".*q_proj": 4, "0.self_attn.q_proj": 2}, r"0\.self_attn\.q_proj"),  # the first one takes it all
    ],
)
def test_a_key_without_effect_is_an_error(option: str, pattern: dict[str, int], idle: str) -> None:
    options: dict[str, Any] = {"targets": ["q_proj", "k_proj"], option: pattern}
    with pytest.raises(ValueError, match=rf"^lora.{option}: {idle} applies to no layer of lora.targets"):
        injected(LoraConfig(**options))


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_keys_whose_order_peft_does_not_save_are_an_error(option: str) -> None:
    """PEFT sorts the keys when it saves, so that another one would count for whoever loads the adapter."""
    pattern = {"up_proj": 4, r"layers\.0\..*": 8}

    def inject_with(pattern: dict[str, int]) -> dict[str, FusedLoRALayer]:
        options: dict[str, Any] = {option: pattern}
        return injected(LoraConfig(**options))

    with pytest.raises(ValueError, match=rf"^lora.{option}: up_proj and layers.* both match model.layers.0.mlp.up_proj, and"):
        inject_with(pattern)
    assert inject_with(dict(reversed(pattern.items())))
    assert inject_with(dict.fromkeys(pattern, 4)), "both keys have the same value"


# Inits


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(("init", "theirs"), [("default", True), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")])
def test_adapters_are_initialised_as_in_stock_peft(init: Any, theirs: Any) -> None:
    targets = ["embed_tokens", *find_targets(tiny_llama(), "all-linear").names]
    layers = injected(LoraConfig(rank=4, init_lora_weights=init, targets=targets), seed=5)
    model = tiny_llama()
    torch.manual_seed(5)
    stock = get_peft_model(model, PeftLoraConfig(r=4, target_modules=targets, init_lora_weights=theirs))
    for name, layer in layers.items():
        other: Any = stock.get_submodule(f"base_model.model.{name}")
        theirs_a, theirs_b = other.lora_embedding_A, other.lora_embedding_B
        is_embedding = isinstance(layer, FusedLoRAEmbedding)
        if not is_embedding:
            theirs_a, theirs_b = ({"default": part["default"].weight} for part in (other.lora_A, other.lora_B))
        assert torch.equal(layer.master_a, theirs_a["default"]) and layer.master_a.any() != is_embedding
        assert torch.equal(layer.master_b, theirs_b["default"])
        assert layer.master_a.dtype == layer.master_b.dtype == torch.float32
        assert layer.master_b.any() == (init == "orthogonal" or is_embedding)
        assert torch.allclose(layer.master_b @ layer.master_a, torch.zeros(()), atol=1e-6), "it begins as the base model"


# Saving and loading


def fill_embedding(policy: Policy) -> None:
    """Give the embedding's A, which begins at zero, random values."""
    if EMBEDDING in policy.layers:
        nn.init.normal_(policy.layers[EMBEDDING].master_a, generator=torch.Generator().manual_seed(0))


def merged(folder: Path, policy: Policy, scaling: Callable[[int], float]) -> Any:
    """The base model in fp64 with each layer's `scaling(rank) * B @ A` in its weight."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, layer in policy.layers.items():
        a, b = layer.master_a.detach().double(), layer.master_b.detach().double()
        update = scaling(len(a)) * b @ a
        module = model.get_submodule(name)
        # A separate parameter: the tied one is unmodified.
        module.weight = nn.Parameter(module.weight.detach() + (update.t() if name == EMBEDDING else update))
    return model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # with a tied head, with a separate one
@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({"alpha": 40, "use_rslora": True}, 40),
        ({"rank_pattern": {r"layers\.1\..*": 32, "q_proj": 4}}, 8),
        ({"alpha_pattern": {"q_proj": 4.5, "mlp.*": 4.5}, "targets": ["q_proj", "up_proj"]}, 4.5),
        ({"targets": Q_OF_0_AND_MLP_OF_1, "rank_pattern": {"up_proj": 2}, "use_rslora": True}, 8),
        ({"targets": ["lm_head", "q_proj"], "rank_pattern": {"lm_head": 64}}, 8),
        ({"targets": ".*q_proj|lm_head", "use_rslora": True, "init_lora_weights": "gaussian"}, 8),
        ({"targets": ["lm_head"], "init_lora_weights": "orthogonal"}, 8),
        ({"targets": ["embed_tokens", "up_proj"], "rank_pattern": {"embed_tokens": 3}}, 8),
        ({"targets": ["embed_tokens"], "use_rslora": True}, 8),
        ({"targets": ["embed_tokens", "lm_head"], "init_lora_weights": "gaussian"}, 8),
    ],
    ids=[
        *("rslora", "ranks", "alphas", "expression", "head", "head by expression", "head alone"),
        *("embedding", "embedding alone", "embedding and head"),
    ],
)
def test_a_saved_adapter_is_the_same_function_in_stock_peft(
    make_policy, tiny_model_path, tmp_path: Path, kind: str, options: dict[str, Any], alpha: float
) -> None:
    policy, folder = make_policy(kind, **options), tiny_model_path(kind)
    fill_embedding(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.save_adapter(tmp_path / "adapter")
    oracle = merged(folder, policy, lambda r: alpha / (r**0.5 if options.get("use_rslora") else r))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits.double(), oracle(ids).logits, rtol=1e-4, atol=1e-4)
        with stock.disable_adapter():
            assert not torch.allclose(stock(ids).logits.double(), oracle(ids).logits, atol=0.1)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], "lm_head|.*q_proj"])
def test_an_adapter_on_the_head_is_saved_without_the_heads_weights(make_policy, tmp_path: Path, targets: Any) -> None:
    policy = make_policy(targets=targets)
    policy.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.{name}.lora_{ab}.weight" for name in policy.layers for ab in "AB"}
    assert saved["base_model.model.lm_head.lora_B.weight"].shape == (260, 16)


def test_an_adapter_on_the_embedding_is_saved_under_pefts_names_without_the_embeddings_weights(
    make_policy, tmp_path: Path
) -> None:
    policy = make_policy(targets=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 5})
    policy.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = f"base_model.model.{EMBEDDING}"
    assert {key: tuple(t.shape) for key, t in saved.items() if "embed" in key} == {
        f"{prefix}.lora_embedding_A": (5, 260),
        f"{prefix}.lora_embedding_B": (96, 5),
    }
    assert len(saved) == len(policy.masters)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["lm_head", "q_proj"]},
        {"targets": ["lm_head", "embed_tokens", "k_proj"], "rank_pattern": {"embed_tokens": 7}},
        {"targets": Q_OF_0_AND_MLP_OF_1, "rank_pattern": {"up_proj": 2, "q_proj": 40}, "alpha_pattern": {"q_proj": 2.5}},
        {"init_lora_weights": "orthogonal", "use_rslora": True},
    ],
)
def test_loading_is_bit_exact(make_policy, tmp_path: Path, options: dict[str, Any]) -> None:
    saved, loaded = make_policy(seed=1, **options), make_policy(seed=2, **options)
    fill_embedding(saved)
    saved.save_adapter(tmp_path)
    assert not any(map(torch.equal, saved.masters[1::2], loaded.masters[1::2]))
    loaded.load_adapter(tmp_path)
    assert all(map(torch.equal, saved.masters, loaded.masters))


PATTERN = {"(q)_proj": 4, ".*(q|k)_proj": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {}}, "its rank_pattern is {}, not {'(q)_proj': 4"),
        ({"alpha_pattern": PATTERN | {"(q)_proj": 4.5}}, "its alpha_pattern is {'(q)_proj': 4.5, "),
        ({"use_rslora": True}, "its use_rslora is True, not False"),
        ({"use_dora": True}, "uses use_dora"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"lora_dropout": 0.05}, "uses lora_dropout"),
        ({"init_lora_weights": "pissa_niter_4"}, "needs the base weights changed by pissa_niter_4"),
    ],
)
def test_a_saved_adapter_with_another_meaning_is_an_error(
    make_policy, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"targets": "qkv", "rank_pattern": PATTERN, "alpha_pattern": PATTERN}
    make_policy(seed=1, **options).save_adapter(tmp_path)
    policy = make_policy(seed=2, **options)
    before = [parameter.detach().clone() for parameter in policy.masters]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=r"^the adapter in ") as caught:
        policy.load_adapter(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert all(map(torch.equal, before, policy.masters))
