"""Multiply-adds of a rankup training step, computed from the shapes. Plain Python.

    model = ModelShape.read(Path("path/to/model"))
    step_operations(model, [(64, [64] * 8)] * 2, rank=64)       # {"base": ..., "adapter": ..., "attention": ..., "head": ...}

The count is of the matrix products in `kernels/`, for T tokens in the packs and N targets; I = d_in, O = d_out, r the rank.
The last token of a completion is a target but never an input.

    base        x W^T                                                T I O          each layer
                g W                                                  T I O          where dx is needed
    adapter     h = x a^T, h b^T                                     T r (I + O)
                u = g b, u^T x, g^T h                                T r (I + 2 O)
                u a                                                  T r I          where dx is needed
    attention   q k^T, w v, and two products for the gradients of each: 6 d_head per attention score (if the weights are few
                enough to be stored). Future tokens are included, since the kernel computes full blocks; padding is not
    head        logits, and their product with the frozen head: 2 N D V

q, k and v of the first layer read the frozen embeddings, so they need no dx.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GroupShape = tuple[int, Sequence[int]]  # prompt length, completion lengths


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like model with an adapter on every linear layer except the head."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @staticmethod
    def read(model_path: Path) -> ModelShape:
        """From the model's `config.json`."""
        config = json.loads((model_path / "config.json").read_text())
        heads = config["num_attention_heads"]
        return ModelShape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    @property
    def qkv(self) -> list[tuple[int, int]]:
        """(I, O) of q, k and v."""
        return [(self.hidden, heads * self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(I, O) of the linear layers of a block."""
        out = (self.heads * self.head_dim, self.hidden)
        gate = up = (self.hidden, self.intermediate)
        return [*self.qkv, out, gate, up, (self.intermediate, self.hidden)]


def num_tokens(groups: Sequence[GroupShape]) -> tuple[int, int]:
    """T, the tokens that pass through the model with each prompt once, and N, the targets."""
    tokens = sum(prompt + sum(length - 1 for length in completions) for prompt, completions in groups)
    return tokens, sum(sum(completions) for _, completions in groups)


def step_operations(model: ModelShape, groups: Sequence[GroupShape], *, rank: int) -> dict[str, int]:
    """Multiply-adds of one training step by kind; see the docstring of the module."""
    tokens, targets = num_tokens(groups)
    all_weights = model.layers * sum(i * o for i, o in model.projections)
    weights_without_dx = sum(i * o for i, o in model.qkv)
    all_sides = model.layers * sum(3 * i + 3 * o for i, o in model.projections)
    sides_without_dx = sum(i for i, _ in model.qkv)
    return {
        "base": tokens * (2 * all_weights - weights_without_dx),
        "adapter": tokens * rank * (all_sides - sides_without_dx),
        "attention": model.layers * model.heads * 6 * model.head_dim * sum(map(_scores, groups)),
        "head": 2 * targets * model.hidden * model.vocabulary,
    }


def _scores(group: GroupShape) -> int:
    """Attention scores of one head: the prompt with itself, then all completions padded to the longest."""
    prompt, completions = group
    widest = max(completions) - 1
    return prompt * prompt + len(completions) * widest * (prompt + widest)
