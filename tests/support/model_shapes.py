"""Shapes of real models, without weights."""

from __future__ import annotations

import json
from pathlib import Path

from rankup.grpo.memory.shapes import ModelShape, read_shape

QWEN_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""What the memory plan reads of the `config.json` of Qwen2.5-7B."""


def write_qwen_7b(folder: Path) -> str:
    """Write that `config.json`; returns the folder as a model's name."""
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return str(folder)


def qwen_7b(folder: Path) -> ModelShape:
    """Its shape, read from a `config.json` in this folder."""
    return read_shape(write_qwen_7b(folder))
