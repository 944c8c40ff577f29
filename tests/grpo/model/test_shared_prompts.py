"""Which models can take packs with shared prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rankup.grpo.model.shared_prompts import why_prompts_cannot_be_shared

SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.MiniMaxConfig(**SMALL, num_key_value_heads=2, layer_types=["linear_attention", "full_attention"]),
            "its attention cannot be replaced",
        ),
        (
            transformers.PhimoeConfig(**SMALL, num_key_value_heads=2, num_local_experts=2, sliding_window=6),
            "only its masks know its sliding window",
        ),
        (
            transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True),
            "its attention is not causal",
        ),
        (transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50), "its attention cannot be replaced"),
    ],
)
def test_a_model_says_why_its_prompts_cannot_be_shared(config: transformers.PreTrainedConfig, reason: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert why_prompts_cannot_be_shared(model) == reason
