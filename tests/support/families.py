"""Tiny random models of the families that people train in 2026, for tests and for `scripts/zoo.py`: no download.

    folder = make_family(tmp_path / "gemma3", "gemma3")

Each has what is special about its family: windows shorter than the sequences of the tests, caps on scores and logits, layers
without positions, delta nets, convolutions, state spaces, experts. Widths differ wherever the family allows it; biases,
norms and sinks are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_models import SIZES, vision_config, write_random_model, write_random_vision_model

WINDOW = 6
SLIDING = ["sliding_attention", "full_attention"]
PARTIAL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
MINISTRAL_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    "max_position_embeddings": 512,
}
GPT_OSS_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}
DELTA_NET = {
    **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    **{"linear_num_key_heads": 1, "linear_num_value_heads": 2, "head_dim": 32},
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        config: transformers' configuration.
        special: what is special about it.
        options: what a tiny model of it adds to the common sizes.
        dtype: float32, unless vLLM has no kernels for that on CPU.
        tower: of a checkpoint with a vision tower: the options of the tower, and those of the complete model under "".
    """

    config: str
    special: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    tower: dict[str, Any] | None = None


QWEN_TOWER = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16},
    "": {"image_token_id": 255, "video_token_id": 256, "vision_start_token_id": 257, "vision_end_token_id": 258},
}
SIGLIP_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "tied head", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama-biases": Family(
        "LlamaConfig",
        "biases, scaled rotary embedding",
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-heads": Family("LlamaConfig", "a key head for each query head", {"head_dim": 32, "num_key_value_heads": 4}),
    "qwen2": Family("Qwen2Config", "biases of q, k and v", {"hidden_size": 128, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", "norms of q and k", {"head_dim": 32}),
    "ministral3": Family("Ministral3Config", "queries scaled by position", {"head_dim": 32, "rope_parameters": MINISTRAL_ROPE}),
    "granite": Family(
        "GraniteConfig",
        "multipliers",
        {
            **{"hidden_size": 128, "logits_scaling": 4.0, "embedding_multiplier": 6.0},
            **{"residual_multiplier": 0.5, "attention_multiplier": 0.2},
        },
    ),
    "gemma2": Family(
        "Gemma2Config",
        "windows, caps on scores and logits",
        {
            **{"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24},
            **{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 5.0, "layer_types": SLIDING},
        },
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "windows, a rotary embedding for each kind of layer",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "layer_types": SLIDING},
    ),
    "gemma4": Family(
        "Gemma4TextConfig",
        "windows, wider heads in full layers, embeddings for each layer",
        {
            **{"head_dim": 32, "global_head_dim": 64, "sliding_window": WINDOW, "layer_types": SLIDING},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": SIZES["vocab_size"]},
        },
    ),
    "cohere2": Family(
        "Cohere2Config",
        "windows, full layers without positions, parallel blocks",
        {"hidden_size": 128, "sliding_window": WINDOW, "layer_types": SLIDING, "logit_scale": 0.25},
    ),
    "exaone4": Family(
        "Exaone4Config",
        "windows, full layers without positions, norms behind blocks",
        {"head_dim": 32, "sliding_window": WINDOW, "layer_types": SLIDING},
    ),
    "mistral": Family("MistralConfig", "a window in all layers", {"head_dim": 32, "sliding_window": WINDOW}),
    "glm4": Family(
        "Glm4Config",
        "gate and up packed, partial rotary embedding, four norms",
        {"head_dim": 32, "rope_parameters": PARTIAL_ROTARY},
    ),
    "phi3": Family(
        "Phi3Config",
        "q, k and v packed, gate and up packed",
        {"hidden_size": 128, "pad_token_id": 0, "eos_token_id": [2, 3]},
    ),
    "qwen3-moe": Family("Qwen3MoeConfig", "experts", {"head_dim": 32, "norm_topk_prob": True, **EXPERTS}),
    "gpt-oss": Family(
        "GptOssConfig",
        "experts with biases, windows, sinks",
        {
            **{"head_dim": 32, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"layer_types": SLIDING, "rope_parameters": GPT_OSS_ROPE},
        },
    ),
    "qwen3-next": Family(
        "Qwen3NextConfig",
        "gated delta nets, gated attention, experts and a shared one",
        {
            **{"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 56},
            **DELTA_NET,
            **EXPERTS,
        },
        dtype="bfloat16",
    ),
    "granite4-hybrid": Family(
        "GraniteMoeHybridConfig",
        "Mamba, experts and a shared MLP",
        {
            **{"hidden_size": 128, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4},
            **{"num_experts_per_tok": 2, "shared_intermediate_size": 72, "intermediate_size": 64, "mamba_chunk_size": 16},
            **{"mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "logits_scaling": 2.0},
        },
    ),
    "nemotron-h": Family(
        "NemotronHConfig",
        "Mamba, attention or an MLP in each layer",
        {
            **{"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "head_dim": 32, "chunk_size": 16},
            **{"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16},
        },
    ),
    "seed-oss": Family("SeedOssConfig", "biases of q, k and v", {"head_dim": 32, "attention_bias": True}),
    "smollm3": Family(
        "SmolLM3Config", "layers without positions", {"hidden_size": 128, "no_rope_layers": [1, 0], "pad_token_id": 0}
    ),
    "olmo3": Family(
        "Olmo3Config",
        "windows, norms behind blocks, norms of q and k over all heads",
        {"hidden_size": 128, "sliding_window": WINDOW, "layer_types": SLIDING},
    ),
    "lfm2": Family(
        "Lfm2Config",
        "short convolutions",
        {
            **{"hidden_size": 128, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
            # Fields of the published configurations that transformers has no default for.
            **{"block_dim": 128, "conv_dim": 128, "conv_dim_out": 128, "block_mlp_init_scale": 1.0},
        },
    ),
    "qwen3.5": Family(
        "Qwen3_5TextConfig",
        "gated delta nets, gated attention",
        {"layer_types": ["linear_attention", "full_attention"], **DELTA_NET},
        dtype="bfloat16",
    ),
    "glm4-moe": Family(
        "Glm4MoeConfig",
        "experts and a shared one behind a dense layer, partial rotary embedding",
        {
            **{"head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
            **{"first_k_dense_replace": 1, "use_qk_norm": True, "rope_parameters": PARTIAL_ROTARY, "num_mtp_layers": 0},
        },
    ),
    "gemma3-vision": Family(
        "Gemma3Config",
        "a vision tower; text as gemma3",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "layer_types": SLIDING},
        tower={
            **{**SIGLIP_TOWER, "image_size": 16, "patch_size": 4},
            "": {"mm_tokens_per_image": 4, "image_token_index": 256, "tie_word_embeddings": True},
        },
    ),
    "gemma4-vision": Family(
        "Gemma4Config",
        "a vision tower; text as gemma4",
        {
            **{"head_dim": 32, "global_head_dim": 64, "sliding_window": WINDOW, "layer_types": SLIDING},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": SIZES["vocab_size"]},
        },
        tower={
            **{**SIGLIP_TOWER, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64},
            # Stock transformers computes another token in their place, so none is one of the random tokens of the tests.
            "": {"image_token_id": 3, "video_token_id": 3, "audio_token_id": 3, "tie_word_embeddings": True},
        },
    ),
    "mistral3": Family(
        "Mistral3Config",
        "a vision tower; text as mistral",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        tower={**SIGLIP_TOWER, "model_type": "pixtral", "image_size": 16, "patch_size": 4, "": {"image_token_index": 256}},
    ),
    "mistral3-ministral3": Family(
        "Mistral3Config",
        "a vision tower; text as ministral3",
        {"model_type": "ministral3", "head_dim": 32, "rope_parameters": MINISTRAL_ROPE},
        tower={**SIGLIP_TOWER, "model_type": "pixtral", "image_size": 16, "patch_size": 4, "": {"image_token_index": 256}},
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLConfig",
        "a vision tower, three kinds of positions; text as qwen2",
        {"hidden_size": 128, "rope_parameters": {**MROPE, "mrope_section": [4, 6, 6]}},
        tower={**QWEN_TOWER, "out_hidden_size": 128, "fullatt_block_indexes": [0], "window_size": 16},
    ),
    "qwen3-vl": Family(
        "Qwen3VLConfig",
        "a vision tower, three kinds of positions; text as qwen3",
        {"head_dim": 32, "rope_parameters": {**MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        tower={**QWEN_TOWER, "out_hidden_size": SIZES["hidden_size"], "deepstack_visual_indexes": [0]},
    ),
    "qwen3.5-vision": Family(
        "Qwen3_5Config",
        "a vision tower, three kinds of positions; text as qwen3.5",
        {
            **{"layer_types": ["linear_attention", "full_attention"], **DELTA_NET},
            "rope_parameters": {
                **{**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
            },
        },
        dtype="bfloat16",
        tower={**QWEN_TOWER, "out_hidden_size": SIZES["hidden_size"]},
    ),
}


def config_of(name: str) -> Any:
    """transformers' configuration of a tiny model of a family."""
    import transformers

    family = FAMILIES[name]
    if family.tower is not None:
        return vision_config(family.config, family.options, family.tower)
    return getattr(transformers, family.config)(**SIZES | family.options)


def make_family(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a random model of a family (see `FAMILIES`) with its tokenizer to `folder`, in fp32; returns the folder."""
    family = FAMILIES[name]
    if family.tower is not None:
        return write_random_vision_model(folder, config_of(name), seed=seed)
    return write_random_model(folder, family.config, family.options, seed=seed)
