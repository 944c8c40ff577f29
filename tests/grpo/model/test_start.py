"""Training that starts from an existing adapter: the same function as in stock PEFT, options, fingerprints and notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file, save_file
from stock_adapters import WEIGHTS, change_config, change_weights, stock_logprobs
from transformers import LlamaConfig, LlamaForCausalLM

from rankup import GRPOConfig
from rankup.grpo.config import LoraConfig
from rankup.grpo.model.adapters import inject
from rankup.grpo.model.lora_layers import FusedLoRALayer
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import trainer_logprobs
from rankup.grpo.model.start import LayerFactors, StartAdapter, describe_start, read_start, resolve_start, write_start

SEQUENCES = [list(range(5, 45)), list(range(200, 170, -1))]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning"
)

Save = Callable[..., Path]


def largest_difference(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\..*": 12},
    "alpha_pattern": {"v_proj": 3, r".*layers\.1\.mlp\..*": 40},
}
HEAD = {"target_modules": ["lm_head", "q_proj"]}
EMBEDDING = {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unchanged": ({}, {}),
    "a larger rank": ({}, {"rank": 16}),
    "rank 64": ({}, {"rank": 64, "alpha": 32}),
    "rank 128": ({"r": 64}, {"rank": 128}),
    "another alpha": ({}, {"alpha": 5}),
    "rsLoRA before": ({"use_rslora": True}, {"use_rslora": False}),
    "rsLoRA from now on": ({}, {"use_rslora": True}),
    "rsLoRA on both sides": ({"use_rslora": True}, {"rank": 24}),
    "patterns": (PATTERNS, {}),
    "patterns before": (PATTERNS, {"rank": 16, "alpha": 9}),
    "patterns from now on": ({}, {"rank": 8, "rank_pattern": {"up_proj": 32}, "alpha_pattern": {"q_proj": 2}}),
    "more targets": ({}, {"targets": "all-linear"}),
    "more of everything": (PATTERNS, {"targets": "all-linear", "rank": 32, "init_lora_weights": "gaussian"}),
    "orthogonal": ({}, {"rank": 16, "targets": "all-linear", "init_lora_weights": "orthogonal"}),
    "an expression": ({"target_modules": r".*layers\.1\..*(q|up)_proj"}, {}),
    "some of the layers": ({"layers_to_transform": [1]}, {}),
    "without some of the layers": ({"exclude_modules": r".*layers\.0\.self_attn\.q_proj"}, {"rank": 9}),
    "the head": (HEAD, {}),
    "the head, and more rank": (HEAD, {"rank": 16, "alpha": 3}),
    "the embedding": (EMBEDDING, {}),
    "the embedding, and more rank": (EMBEDDING, {"rank": 16, "alpha": 3, "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # with a tied head, with a separate one
@pytest.mark.parametrize(("theirs", "ours"), CASES.values(), ids=CASES)
def test_training_starts_as_the_function_that_the_adapter_is_in_stock_peft(
    tiny_model_path, save_stock: Save, resolve, kind: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    folder = save_stock(kind, **theirs)
    config, start = resolve(folder, kind, **ours)
    policy = Policy(str(tiny_model_path(kind)), lora=config.lora, start=start, dtype="float32")
    expected = stock_logprobs(tiny_model_path(kind), folder, SEQUENCES)
    assert largest_difference(trainer_logprobs(policy, SEQUENCES), expected) < 2e-5
    assert largest_difference(trainer_logprobs(policy, SEQUENCES, use_adapter=False), expected) > 0.1
    for option, value in ours.items():
        assert getattr(config.lora, option) == value
    assert resolve_start(config, str(tiny_model_path(kind)))[0] == config


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    larger=st.integers(0, 9),
    alphas=st.tuples(*[st.floats(0.1, 300)] * 2),
    rslora=st.tuples(st.booleans(), st.booleans()),
    init=st.sampled_from(["default", "gaussian", "orthogonal"]),
    has_layer=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_every_update_is_the_same_matrix(data, larger, alphas, rslora, init, has_layer) -> None:
    """Whatever ranks, scales and layers the adapter and the run have."""
    rank = data.draw(st.integers(1, 9))
    new_rank = rank + larger
    new_rank += init == "orthogonal" and new_rank % 2
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    targets = ["embed_tokens", "lm_head", "down_proj"]
    lora = {"rank": new_rank, "alpha": alphas[1], "use_rslora": rslora[1], "targets": targets, "init_lora_weights": init}
    inject(model, LoraConfig(**lora), seed=0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALayer)}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    factors = {}
    for (name, layer), is_there in zip(layers.items(), has_layer, strict=True):
        if is_there:
            a = torch.randn(rank, layer.master_a.shape[1], generator=generator)
            b = torch.randn(layer.master_b.shape[0], rank, generator=generator)
            scaling = alphas[0] / (rank**0.5 if rslora[0] else rank)
            factors[name] = LayerFactors(a=a, b=b, scaling=scaling, is_embedding="embed" in name)
    write_start(layers, StartAdapter(folder=Path(), peft=PeftLoraConfig(), layers=factors, base_weights={}))
    for name, layer in layers.items():
        update = layer.scaling["default"] * layer.master_b.double() @ layer.master_a.double()
        if name in factors:
            expected = factors[name].scaling * factors[name].b.double() @ factors[name].a.double()
            assert torch.linalg.norm(update - expected) < 1e-6 * torch.linalg.norm(expected)
        else:
            assert update.abs().max() < 1e-5


def test_new_rows_of_a_are_initialised_so_that_they_can_learn(tiny_model_path, save_stock: Save, resolve) -> None:
    config, start = resolve(save_stock(**HEAD), rank=16, targets=["q_proj", "o_proj", "lm_head", "embed_tokens"])
    policy = Policy(str(tiny_model_path("llama")), lora=config.lora, start=start, dtype="float32", seed=4)
    new = Policy(str(tiny_model_path("llama")), lora=config.lora, dtype="float32", seed=4)
    for name, layer in policy.layers.items():
        rank = start.layers[name].rank if name in start.layers else 0
        assert torch.equal(layer.master_a[rank:], new.layers[name].master_a[rank:])
        assert torch.equal(layer.master_b[:, rank:], new.layers[name].master_b[:, rank:])
        assert layer.master_a[rank:].any() or layer.master_b[:, rank:].any()


def test_an_adapter_of_rankup_is_read_bit_exactly(make_policy, tiny_model_path, resolve, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank_pattern": {"up_proj": 5, "o_proj": 64}, "alpha": 7, "use_rslora": True}
    saved = make_policy(**options)
    saved.save_adapter(tmp_path / "adapter")
    config, start = resolve(tmp_path / "adapter")
    policy = Policy(str(tiny_model_path("llama")), lora=config.lora, start=start, dtype="float32", seed=9)
    assert all(map(torch.equal, saved.masters, policy.masters))
    saved.write_slots()
    for name, slot in saved.slots.items():
        assert torch.equal(slot.a, policy.slots[name].a) and torch.equal(slot.b, policy.slots[name].b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(tiny_model_path, save_stock: Save, resolve, dtype: torch.dtype) -> None:
    folder = save_stock()
    save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    config, start = resolve(folder)
    policy = Policy(str(tiny_model_path("llama")), lora=config.lora, start=start, dtype="float32")
    expected = stock_logprobs(tiny_model_path("llama"), folder, SEQUENCES)
    assert largest_difference(trainer_logprobs(policy, SEQUENCES), expected) < 2e-5
    for name, layer in policy.layers.items():
        assert torch.equal(layer.master_b, start.layers[name].b.float())


# Options that come from the adapter


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({}, {}, {"rank": 8, "alpha": 12, "targets": ["q_proj", "up_proj", "v_proj"], "max_rank": 64}),
        ({"r": 100}, {}, {"rank": 100, "max_rank": 128}),
        ({"rank_pattern": {"q_proj": 100}}, {}, {"rank": 8, "rank_pattern": {"q_proj": 100}, "max_rank": 128}),
        ({"target_modules": ["v_proj", "k_proj", "q_proj"]}, {}, {"targets": "qkv"}),
        ({"target_modules": "all-linear"}, {}, {"targets": "all-linear"}),
        ({"target_modules": ".*(q|v)_proj"}, {}, {"targets": ".*(q|v)_proj"}),
        ({"target_modules": "lm_head"}, {}, {"targets": ["lm_head"]}),
        (
            {"layers_to_transform": [1], "target_modules": ["q_proj"]},
            {},
            {"targets": ["model.layers.1.self_attn.q_proj"]},
        ),
        ({"use_rslora": True}, {"rank": 16}, {"rank": 16, "alpha": 12, "use_rslora": True}),
        (PATTERNS, {}, PATTERNS),
        (PATTERNS, {"rank": 16}, {"rank": 16, "rank_pattern": {}, "alpha": 12, "alpha_pattern": PATTERNS["alpha_pattern"]}),
        (PATTERNS, {"alpha": 1}, {"alpha": 1, "alpha_pattern": {}, "rank_pattern": PATTERNS["rank_pattern"]}),
        (PATTERNS, {"rank_pattern": {".*_proj": 64}}, {"rank": 8, "rank_pattern": {".*_proj": 64}}),
        ({"rank_pattern": {"q_proj": 4, "gate_proj": 2}}, {}, {"rank_pattern": {"q_proj": 4}}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_options_that_are_not_set_come_from_the_adapter(
    save_stock: Save, resolve, theirs: dict[str, Any], ours: dict[str, Any], expected: dict[str, Any]
) -> None:
    config, _ = resolve(save_stock(**theirs), **ours)
    assert {name: getattr(config.lora, name) for name in expected} == expected


def test_without_an_adapter_the_configuration_is_unchanged() -> None:
    config = GRPOConfig(rank=3)
    assert resolve_start(config, "no model is read") == (config, None)


def test_the_fingerprint_is_of_weights_and_scales(save_stock: Save) -> None:
    folder = save_stock()
    first = read_start(folder).fingerprint
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    weights = folder / WEIGHTS
    data = weights.read_bytes()
    weights.unlink()
    assert read_start(folder).fingerprint == first
    weights.write_bytes(data)
    change_config(folder, base_model_name_or_path="moved")
    assert read_start(folder).fingerprint == first
    change_config(folder, lora_alpha=13)
    assert read_start(folder).fingerprint != first
    change_config(folder, lora_alpha=12)
    change_weights(folder, lambda weights: next(iter(weights.values())).view(-1)[:1].add_(1e-3))
    assert read_start(folder).fingerprint != first


@pytest.mark.parametrize(
    ("theirs", "ours", "expected", "notes"),
    [
        ({}, {"rank": 4}, {"rank": 8, "max_rank": 64}, ["lora.rank: 8, not 4"]),
        ({"r": 100}, {"rank": 64}, {"rank": 100, "max_rank": 128}, ["lora.rank: 100, not 64"]),
        ({"r": 100}, {"rank": 64, "max_rank": 128}, {"rank": 100, "max_rank": 128}, ["lora.rank: 100, not 64"]),
        (
            {},
            {"rank": 16, "rank_pattern": {"q_proj": 7}},
            {"rank": 16, "rank_pattern": {"q_proj": 8}},
            ["lora.rank_pattern.q_proj: 8, not 7"],
        ),
        ({"rank_pattern": {"q_proj": 12}}, {"rank": 8}, {"rank": 12, "rank_pattern": {}}, ["lora.rank: 12, not 8"]),
        ({"rank_pattern": {"q_proj": 12}}, {"rank_pattern": {"q_proj": 4}}, {"rank_pattern": {"q_proj": 12}}, None),
        ({}, {"rank": 8}, {"rank": 8}, []),
    ],
)
def test_ranks_that_are_set_smaller_are_raised_with_a_note(
    save_stock: Save, resolve, tiny_model_path, theirs: Any, ours: Any, expected: dict[str, Any], notes: list[str] | None
) -> None:
    folder = save_stock(**theirs)
    config, start = resolve(folder, **ours)
    assert {name: getattr(config.lora, name) for name in expected} == expected
    if notes is not None:
        assert list(config.notes) == [f"{note}, which the adapter of lora.start_from has" for note in notes]
    policy = Policy(str(tiny_model_path("llama")), lora=config.lora, start=start, dtype="float32")
    logprobs = stock_logprobs(tiny_model_path("llama"), folder, SEQUENCES)
    assert largest_difference(trainer_logprobs(policy, SEQUENCES), logprobs) < 2e-5
    again, _ = resolve_start(config, str(tiny_model_path("llama")))
    assert again == config and again.notes == config.notes


# Notes


def test_notes_tell_the_conversion_the_dropout_and_another_base_model(save_stock: Save, resolve, tiny_model_path) -> None:
    model_path, folder = str(tiny_model_path("llama")), save_stock()
    same, _ = resolve(folder, model=model_path)
    assert list(describe_start(same, model_path)) == [f"training starts from the adapter {folder}: rank 8, alpha 12"]
    change_config(folder, lora_dropout=0.05, base_model_name_or_path="someone/elses-model")
    config, _ = resolve(folder, model=model_path, rank=64)
    assert list(describe_start(config, model_path)) == [
        f"training starts from the adapter {folder}: rank 64, alpha 12, converted from rank 8 and alpha 12",
        f"the adapter {folder} was trained with dropout 0.05; this run trains it without",
        f"the adapter {folder} was trained on someone/elses-model, and this run trains {model_path}: the shapes fit",
    ]
    assert not list(describe_start(GRPOConfig(), model_path))
