"""What a pass takes: two layers speak for all of them exactly, on both devices, and packs are full."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.step_memory import fake_tensors, full_pack, make_pack, measure_pass
from rankup.grpo.model.policy import Policy

pytestmark = pytest.mark.slow

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "a large vocabulary": {"vocab_size": 20_000},
    "windows": {"model_type": "mistral", "sliding_window": 16},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 16},
    "one row per completion": {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
}


def config(*, checkpointing: bool = False, targets: Any = "all-linear", load_in: str | None = None) -> GRPOConfig:
    return GRPOConfig(
        model={"load_in": load_in},
        lora={"rank": 8, "targets": targets},
        rollout={"max_prompt_length": 40, "max_completion_length": 30, "num_generations": 4},
        optim={"tokens_per_pack": 400, "gradient_checkpointing": checkpointing},
    )


def cases() -> Iterator[Any]:
    """All combinations; by default each family on both devices, and each checkpointed and not."""
    for number, family in enumerate(FAMILIES):
        for device, checkpointing in product(("cpu", "cuda"), (False, True)):
            by_default = (device == "cuda") == (checkpointing ^ number % 2)
            yield pytest.param(family, device, checkpointing, marks=() if by_default else (pytest.mark.exhaustive,))


@pytest.mark.parametrize(("family", "device", "checkpointing"), [*cases()])
def test_two_layers_predict_all_layers_byte_exactly(family: str, device: Any, checkpointing: bool):
    with quiet_stderr():
        two, five = (
            measure_pass(LLAMA | FAMILIES[family], config(checkpointing=checkpointing), device=device, depth=depth)
            for depth in (2, 5)
        )
    assert two == five


def test_the_peak_is_at_the_logits_or_in_the_backward_of_a_layer():
    logits = measure_pass(LLAMA | {"vocab_size": 20_000}, config(), device="cuda")
    assert set(logits) == {"activations", "logits_chunk", "hidden_states"}
    backward = measure_pass(LLAMA | {"vocab_size": 10}, config(checkpointing=True), device="cuda")
    assert {"layer_backward", "layer_again"} <= set(backward) and "logits_chunk" not in backward
    assert backward["activations"] < measure_pass(LLAMA, config(), device="cuda")["activations"] / 4


def test_a_packed_base_forms_the_weight_that_it_multiplies_with():
    few_logits = LLAMA | {"vocab_size": 10, "intermediate_size": 2_000}
    dense, packed = (
        measure_pass(few_logits, config(checkpointing=True, load_in=load_in), device="cuda") for load_in in (None, "nf4")
    )
    assert sum(packed.values()) > sum(dense.values())


def test_layers_without_an_adapter_before_the_first_one_keep_nothing():
    last = config(targets=r".*layers\.4\..*_proj")
    assert measure_pass(LLAMA, last, device="cuda", depth=5)["activations"] < (
        measure_pass(LLAMA, config(), device="cuda")["activations"] / 3
    )


def test_an_adapter_on_the_head_alone_keeps_no_layer():
    alone, all_linear = (measure_pass(LLAMA, config(targets=t), device="cpu", depth=5) for t in (["lm_head"], "all-linear"))
    assert alone["activations"] < all_linear["activations"] / 10


@pytest.mark.parametrize("tokens", [1, 2, 39, 40, 41, 42, 155, 156, 157, 400, 4097])
def test_a_pack_is_full(tokens: int):
    sizes = full_pack(tokens, prompt=40, completion=30, generations=4)
    assert sum(prompt + sum(length - 1 for length in lengths) for prompt, lengths in sizes) == tokens
    assert all(prompt <= 40 and 1 <= len(lengths) <= 4 and max(lengths) <= 30 for prompt, lengths in sizes)


def test_packs_hold_all_groups_of_their_sizes(tiny_model_path):
    folder = str(tiny_model_path("llama"))
    with quiet_stderr(), fake_tensors():
        policy = Policy(folder, lora=config().lora)
        one = make_pack(policy, full_pack(400, prompt=40, completion=30, generations=4), tokens_per_pack=400)
    assert one.num_input_tokens == 400
