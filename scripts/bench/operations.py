"""Multiply-adds of a rankup training step with an adapter on every linear layer except the head, computed from the shapes.

    step_operations(read_shape("path/to/model"), Case(64, 64), rank=64)     # {"base": ..., "adapter": ..., ...}

The count is of the matrix products in `kernels/`, for T tokens in the packs and N targets; I = d_in, O = d_out, r the rank.
The last token of a completion is a target but never an input.

    base        x W^T                                                T I O          each layer
                g W                                                  T I O          where dx is needed
    adapter     h = x a^T, h b^T                                     T r (I + O)
                u = g b, u^T x, g^T h                                T r (I + 2 O)
                u a                                                  T r I          where dx is needed
    attention   q k^T, w v, and two products for the gradients of each: 6 d_head per attention score (if the weights are few
                enough to be stored). Future tokens are included, since the kernel computes full blocks
    head        logits, and their product with the frozen head: 2 N D V

q, k and v of the first layer read the frozen embeddings, so they need no dx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cases import Case

if TYPE_CHECKING:
    from rankup.grpo.memory.shapes import ModelShape

READ_THE_EMBEDDINGS = ("q_proj", "k_proj", "v_proj")


def step_operations(model: ModelShape, case: Case, *, rank: int) -> dict[str, int]:
    """Multiply-adds of one training step by kind; see the docstring of the module."""
    layers = model.targeted("all-linear")
    without_dx = [one for one in layers if ".layers.0." in one.name and one.role in READ_THE_EMBEDDINGS]
    weights = sum(2 * one.d_in * one.d_out for one in layers) - sum(one.d_in * one.d_out for one in without_dx)
    sides = sum(3 * (one.d_in + one.d_out) for one in layers) - sum(one.d_in for one in without_dx)
    prompt, inputs = case.prompt_tokens, case.completion_tokens - 1
    scores = case.prompts * (prompt * prompt + case.completions * inputs * (prompt + inputs))  # of one head
    return {
        "base": case.tokens * weights,
        "adapter": case.tokens * rank * sides,
        "attention": model.layers * model.heads * 6 * model.head_dim * scores,
        "head": 2 * case.targets * model.hidden * model.vocabulary,
    }
