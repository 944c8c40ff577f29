"""A model as one GGUF file, for llama.cpp and what is built on it.

    check_supported(config, tokenizer)                              # before anything is loaded
    write_gguf(model, tokenizer, Path("mine.gguf"), dtype="bfloat16", name="mine")

Supported are Llama (and SmolLM2, which is one), Qwen2 and Qwen3, with byte-level BPE whose way of splitting texts llama.cpp has
a name for. The package `gguf` has the format and the names of weights. Vectors are in float32, as llama.cpp wants them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Kinds of models of transformers, and their names in `gguf.MODEL_ARCH`."""

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPLITTING = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (QWEN2, "ByteLevel without regex"): "qwen2",
    (LLAMA3, "ByteLevel without regex"): "llama-bpe",
}
"""How a tokenizer splits a text before BPE, and the name of it in llama.cpp."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in GGUF."""


def check_supported(config: PreTrainedConfig, tokenizer: object) -> None:
    """Check that a model and its tokenizer can be written.

    Raises:
        ValueError: they cannot, with the reason; or the package `gguf` is missing.
    """
    if find_spec("gguf") is None:
        raise ValueError('--gguf needs the package gguf: pip install "gguf>=0.17"')
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"--gguf: models of the kind {kind} are not supported ({', '.join(ARCHITECTURES)} are): export with --merge, and "
            "convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    rope = _rope(config)
    unsupported = {
        "sliding windows": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "biases": kind == "llama" and (config.attention_bias or config.mlp_bias),
        f"RoPE of the type {rope['rope_type']}": rope["rope_type"] not in ("default", "llama3"),
    }
    for what, has_it in unsupported.items():
        if has_it:
            raise ValueError(f"--gguf: a {kind} model with {what} is not supported")
    _splitting(tokenizer)


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, file: Path, *, dtype: str, name: str
) -> None:
    """Write a model that `check_supported` accepts, matrices in `dtype` and vectors in float32, with its tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    kinds = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}
    kind, file_type = kinds[dtype]
    writer = GGUFWriter(file, model.config.model_type)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[file_type])
    _add_sizes(writer, model.config)
    _add_tokenizer(writer, tokenizer, rows=model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr]
    for of_gguf, weight in _weights(model).items():
        as_kind = GGMLQuantizationType[kind if weight.dim() > 1 else "F32"]
        writer.add_tensor(of_gguf, quants.quantize(weight.float().contiguous().numpy(), as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -------------------------------------------------------------------------------------------------------------- weights


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights by their names in GGUF."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():  # tied ones once
        of_gguf = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert of_gguf is not None, f"GGUF has no name for {name}"
        rows = heads.get(name.split(".")[-2])
        found[of_gguf] = _interleaved(weight.detach(), rows) if rows and config.model_type == "llama" else weight.detach()
    if _rope(config)["rope_type"] == "llama3":
        plain, scaled = (_frequencies(config, kind) for kind in ("default", "llama3"))
        found["rope_freqs.weight"] = plain / scaled
    return found


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a Llama's head; transformers rotates a row and one half a head further."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _frequencies(config: PreTrainedConfig, kind: str) -> torch.Tensor:
    """RoPE's frequencies, [head_dim / 2]."""
    if kind == "default":
        size = _head_dim(config)
        return 1.0 / _rope(config)["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]


def _rope(config: PreTrainedConfig) -> Mapping[str, Any]:
    return config.rope_parameters  # type: ignore[return-value]


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


# ------------------------------------------------------------------------------------------------------------ tokenizer


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, *, rows: int) -> None:
    """The tokenizer, with a name for each of the embedding's `rows`."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: (token, NORMAL) for token, index in backend["model"]["vocab"].items()}
    for token in backend["added_tokens"]:
        by_id[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    tokens = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    merges = backend["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)  # type: ignore[arg-type]


def _splitting(tokenizer: object) -> str:
    """llama.cpp's name of how a tokenizer splits texts.

    Raises:
        ValueError: it has none, or the tokenizer does something else that GGUF cannot say.
    """
    refused = "--gguf: the tokenizer is not supported: "
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{refused}a {type(tokenizer).__name__} is not one of the package tokenizers")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = backend["model"], backend["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise ValueError(f"{refused}it is not byte-level BPE with merges")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise ValueError(f"{refused}it changes texts by {normalizer['type']}")
    steps: dict[str, Any] = backend["pre_tokenizer"] or {"type": "none"}
    parts = tuple(map(_step, steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]))
    if parts not in SPLITTING:
        raise ValueError(f"{refused}llama.cpp has no name for how it splits texts ({', '.join(parts)})")
    return SPLITTING[parts]


def _step(step: Mapping[str, Any]) -> str:
    """One step of splitting, as in `SPLITTING`."""
    match step:
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "ByteLevel"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "ByteLevel without regex"
    return str(step["type"])
