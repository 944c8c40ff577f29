"""What the memory plan reads of the `config.json` of public models that are no plain Llama, and their parameters."""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4},
        **{"attention_bias": True, "sliding_window": 128, "vocab_size": 201088, "tie_word_embeddings": False},
    },
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False},
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": {
            **{"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240},
            "sliding_window": 1024,
        },
        "vision_config": {
            **{"model_type": "siglip_vision_model", "num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304},
            **{"num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False},
        },
    },
    "Qwen3.5-4B": {
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": {
            **{"model_type": "qwen3_5_text", "num_hidden_layers": 32, "hidden_size": 2560, "intermediate_size": 9216},
            **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320},
            **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128},
            **{"linear_value_head_dim": 128, "tie_word_embeddings": True},
        },
    },
}

BASES = {
    "gpt-oss-20b": 20_914_757_184,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gemma-3-4b": 4_300_079_472 - 419_816_304,  # without its vision tower
    "Qwen3.5-4B": 2560 * 248_320  # the embedding, which is also the head
    + 32 * (3 * 2560 * 9216 + 2 * 2560)  # MLPs, and the norms of layers
    + 8 * (2560 * (8192 + 2 * 1024) + 4096 * 2560 + 2 * 256)  # q with its gate, k, v, o, and the norms of q and k
    + 24 * (2560 * (8192 + 4096 + 2 * 32) + 4 * 8192 + 2 * 32 + 128 + 4096 * 2560)  # qkv, z, b, a; convolution; rates; norm; o
    + 2560,
}
"""As published; of Qwen3.5-4B the text model, by hand: the published number includes its vision tower."""

ATTENTION = {  # q, k, v and o: d_in + d_out of each
    "gpt-oss-20b": 24 * ((2880 + 4096) + 2 * (2880 + 512) + (4096 + 2880)),
    "Qwen3-30B-A3B": 48 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)),
    "gemma-3-4b": 34 * ((2560 + 2048) + 2 * (2560 + 1024) + (2048 + 2560)),
    # 8 layers with attention, whose q has a gate, and 24 with delta nets: qkv, z, b, a and the output.
    "Qwen3.5-4B": 8 * ((2560 + 2 * 4096) + 2 * (2560 + 1024) + (4096 + 2560))
    + 24 * ((2560 + 8192) + (2560 + 4096) + 2 * (2560 + 32) + (4096 + 2560)),
}
"""Parameters of an adapter of rank 1 on attention and delta nets."""

MLPS = {"gpt-oss-20b": 0, "Qwen3-30B-A3B": 0, "gemma-3-4b": 34 * 3 * (2560 + 10240), "Qwen3.5-4B": 32 * 3 * (2560 + 9216)}
"""And on MLPs; experts have none."""
