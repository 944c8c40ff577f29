"""Tiny random language models that transformers, PEFT and vLLM all load: real weights, a real tokenizer, no download.

    folder = make_tiny_model(tmp_path / "llama", "llama")

Widths differ from each other wherever the family allows it, so that mixed-up projections show: hidden 96, queries 128 (4 heads
of 32), keys and values 64 (2 heads), MLP 160. Weights are drawn wide enough for logits to be far from flat, and biases and
norms, which transformers initialises to 0 and 1, are drawn too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCABULARY = len(SPECIAL_TOKENS) + 256
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# What each kind adds to the common sizes. `mistral` and `gemma3` have a window shorter than the tests' sequences. The attention
# of `falcon` cannot be replaced, so it is trained on one row per completion.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama64": ("LlamaConfig", {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}),  # rows of complete NF4 blocks
    "qwen2": ("Qwen2Config", {"hidden_size": 128, "tie_word_embeddings": True}),  # its heads divide the hidden size
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": 6}),
    "falcon": ("FalconConfig", {"hidden_size": 128, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 6, "final_logit_softcapping": 30.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32}),
    "cohere": ("CohereConfig", {"hidden_size": 128, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"hidden_size": 128, "logits_scaling": 4.0, "embedding_multiplier": 6.0}),
    "hyperclovax": ("HyperCLOVAXConfig", {"head_dim": 32, "logits_scaling": 0.5}),
}


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What all kinds have, under transformers' names."""


def make_tiny_model(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write a random model of a kind (see `KINDS`) with its tokenizer to `folder`, in fp32 safetensors; returns the folder."""
    return write_random_model(folder, *KINDS[kind], seed=seed)


def write_random_model(folder: Path, config_name: str, options: dict[str, Any], *, seed: int = 0) -> Path:
    """Write a random model of transformers' configuration of this name, with `SIZES` and `options`, and its tokenizer."""
    import torch
    import transformers

    config = getattr(transformers, config_name)(**SIZES | options)
    return _write(folder, lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed=seed)


def vision_config(config_name: str, text: dict[str, Any], tower: dict[str, Any]) -> Any:
    """transformers' configuration of this name, of a model with a vision tower.

    Args:
        text: what the text model adds to `SIZES`.
        tower: that of the tower, and under "" the options of the complete model.
    """
    import transformers

    of_model = {"tie_word_embeddings": False, **tower.get("", {})}
    of_tower = {key: value for key, value in tower.items() if key}
    of_text = {"tie_word_embeddings": of_model["tie_word_embeddings"], **SIZES, **text}
    return getattr(transformers, config_name)(text_config=of_text, vision_config=of_tower, **of_model)


def write_random_vision_model(folder: Path, config: Any, *, seed: int = 0) -> Path:
    """Write a random model of a `vision_config` with its tokenizer; published ones have the same names of weights."""
    import torch
    import transformers

    make = transformers.AutoModelForImageTextToText.from_config
    return _write(folder, lambda: make(config, dtype=torch.float32), seed=seed)


def _write(folder: Path, make: Callable[[], Any], *, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A transformers tokenizer of `VOCABULARY` tokens: the special ones, then one for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
