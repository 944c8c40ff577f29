"""Attention over shared prompts in plain torch, for any dtype and device: a few batched products for each unit of sequences.

One gather collects the queries of all units, one their keys (each completion's behind its prompt's), and one restores the
pack's order of the results; a unit that is computed in one piece copies nothing in between. With weights
W = softmax(scaling * q k^T + mask) and the gradient g of the result,

    out = W v        dv = W^T g        ds = W (g v^T - rowsum(W g v^T))        dq = scaling * ds k        dk = scaling * ds^T q

Two variants of the scores are computed here too. A cap c makes them c tanh(s / c) before the mask (Gemma 2), so ds has the
factor 1 - tanh(s / c)^2. A sink is a score of a query head without a key and a value (gpt-oss): it takes part in the softmax,
so the weights of the keys add up to less than 1, and the formulas hold as they are.

q, k and v are saved for the backward, and so is W if it is small (`KEPT_LIMIT`). Otherwise the backward recomputes W block by
block. `attention_plan.py` defines units, blocks and the shapes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .attention_plan import Block, BlockPlan


def block_attention(
    query_HLD: torch.Tensor,
    key_KLD: torch.Tensor,
    value_KLD: torch.Tensor,
    plan: BlockPlan,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in the plan's layout, [L, H, D] in the inputs' dtype. The values' D may be another one.

    Scores and weights are rounded to the inputs' dtype, as in transformers' eager attention; sums are at least fp32.

    softcap, sinks_H: see the module's docstring. There is no gradient for sinks, which no adapter trains.
    """
    assert sinks_H is None or not sinks_H.requires_grad, "sinks are frozen"
    return _BlockAttention.apply(query_HLD, key_KLD, value_KLD, plan, _Scores(scaling, softcap, sinks_H))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """How scores are made of a query and a key. See the module's docstring."""

    scaling: float
    softcap: float | None
    sinks_H: torch.Tensor | None


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_HLD: torch.Tensor,
        key_KLD: torch.Tensor,
        value_KLD: torch.Tensor,
        plan: BlockPlan,
        scores: _Scores,
    ) -> torch.Tensor:
        ctx.plan, ctx.scores = plan, scores
        keeps_weights = plan.keeps_weights and scores.softcap is None  # the slope of a cap needs the scores anyway
        query_QE = _rows(query_HLD, plan.key_heads).index_select(0, plan.query_rows)
        key_ND, value_ND = (_rows(t, plan.key_heads).index_select(0, plan.key_rows) for t in (key_KLD, value_KLD))
        out_QE = query_QE.new_empty(len(query_QE), plan.heads // plan.key_heads * value_KLD.shape[2])
        kept: list[torch.Tensor] = []
        for block in plan.blocks():
            weights, _ = _weights(block, block.queries(query_QE), block.keys(key_ND), scores)
            torch.bmm(weights, block.keys(value_ND), out=block.queries(out_QE))
            if keeps_weights:
                kept.append(weights)
        ctx.save_for_backward(query_HLD, key_KLD, value_KLD, *kept)
        return out_QE.index_select(0, plan.result_rows).view(-1, plan.heads, value_KLD.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query_HLD, key_KLD, value_KLD, *kept = ctx.saved_tensors
        plan: BlockPlan = ctx.plan
        scores: _Scores = ctx.scores
        query_QE, grad_QE = (
            _rows(t, plan.key_heads).index_select(0, plan.query_rows) for t in (query_HLD, grads[0].transpose(0, 1))
        )
        grad_QE.index_fill_(0, plan.padding, 0.0)  # padding rows repeat tokens that have a row elsewhere
        key_ND, value_ND = (_rows(t, plan.key_heads).index_select(0, plan.key_rows) for t in (key_KLD, value_KLD))
        grad_query_QE = torch.empty_like(query_QE)
        grad_key_ND, grad_value_ND = (_new_total(t, plan) for t in (key_ND, value_ND))
        for block, weights in itertools.zip_longest(plan.blocks(), kept):
            query, grad, grad_query = (block.queries(t) for t in (query_QE, grad_QE, grad_query_QE))
            key, value, grad_key, grad_value = (block.keys(t) for t in (key_ND, value_ND, grad_key_ND, grad_value_ND))
            capped = None
            if weights is None:
                weights, capped = _weights(block, query, key, scores)
            _add_product(grad_value, weights.transpose(1, 2), grad, plan)
            grad_scores = torch.bmm(grad, value.transpose(1, 2))
            torch._softmax_backward_data(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores)  # type: ignore[attr-defined]
            if capped is not None:
                grad_scores.mul_(capped.square_().neg_().add_(1.0))
            torch.baddbmm(grad_query, grad_scores, key, beta=0, alpha=scores.scaling, out=grad_query)
            _add_product(grad_key, grad_scores.transpose(1, 2), query, plan, scores.scaling)
        grad_query_LHD = grad_query_QE.index_select(0, plan.result_rows).view(-1, plan.heads, query_HLD.shape[2])
        grad_key_LKD, grad_value_LKD = (_sum_of_keys(t, plan, key_ND.dtype) for t in (grad_key_ND, grad_value_ND))
        return (*(t.transpose(0, 1) for t in (grad_query_LHD, grad_key_LKD, grad_value_LKD)), None, None)


def _rows(heads_first: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[heads, L, D] as the pack's rows [L * K, heads / K * D]; a view if the heads of a token are contiguous."""
    heads, length, dim = heads_first.shape
    return heads_first.transpose(0, 1).reshape(length * key_heads, heads // key_heads * dim)


def _weights(block: Block, query: torch.Tensor, key: torch.Tensor, scores: _Scores) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of the block's scores, [U * K, T * h, S], and with a cap also tanh(s / c)."""
    mask_TS = block.mask(query)
    logits = query.new_empty(*query.shape[:2], block.columns)
    of_tokens = logits.view(-1, len(mask_TS), block.heads_per_key, block.columns)
    capped = None
    if scores.softcap is None:
        # Adding the product to the mask costs half as much as masking the product.
        of_tokens.copy_(mask_TS[:, None])
        logits.baddbmm_(query, key.transpose(1, 2), alpha=scores.scaling)
    else:
        capped = torch.bmm(query, key.transpose(1, 2)).mul_(scores.scaling / scores.softcap).tanh_()
        torch.mul(capped, scores.softcap, out=logits)
        of_tokens.add_(mask_TS[:, None])
    if scores.sinks_H is None:
        return torch.softmax(logits, -1, out=logits), capped  # safe in place: a row is read completely before it is written
    return _softmax_with_sinks(logits, scores.sinks_H, block), capped


def _softmax_with_sinks(logits: torch.Tensor, sinks_H: torch.Tensor, block: Block) -> torch.Tensor:
    """In place: softmax of each row beside its head's sink, without the sink's own weight."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(-1).to(wide)
    weights = torch.softmax(logits, -1, out=logits)
    log_sum = largest - weights.amax(-1).to(wide).log()  # the largest weight is exp(largest - log_sum)
    # Rows are ordered by sequence, key head, token and query head of the key head.
    sinks_Kh = sinks_H.to(wide).view(block.key_heads, 1, block.heads_per_key)
    share = torch.sigmoid(log_sum.view(-1, block.key_heads, block.stop - block.start, block.heads_per_key) - sinks_Kh)
    return weights.mul_(share.view_as(log_sum)[..., None])


def _new_total(like: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """A buffer for products that sum over queries: zeros in at least fp32 if units have several blocks, else uninitialized."""
    if plan.is_cut:
        return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    return torch.empty_like(like)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, plan: BlockPlan, scaling: float = 1.0) -> None:
    """`total += scaling * left @ right`, or `=` if every unit has one block."""
    if plan.is_cut:
        total.add_(torch.bmm(left, right), alpha=scaling)
    else:
        torch.baddbmm(total, left, right, beta=0, alpha=scaling, out=total)


def _sum_of_keys(grad_ND: torch.Tensor, plan: BlockPlan, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of the pack's keys, [L, K, D], from those of all units' keys: a prompt's are summed over its completions."""
    dim = grad_ND.shape[1]
    grad_LKD = grad_ND.index_select(0, plan.own_rows).view(-1, plan.key_heads, dim)
    if plan.has_prompts_of_several_units:
        grad_LKD = grad_LKD.to(torch.promote_types(dtype, torch.float32))
    for unit in plan.units:
        rows = grad_ND.narrow(0, unit.key_start, unit.count * plan.key_heads * unit.columns)
        of_prompt_UKPD = rows.view(unit.count, plan.key_heads, unit.columns, dim)[:, :, : unit.prompt_length]
        end = 0
        for start, count in unit.prompts if unit.prompt_length else ():
            of_prompt_KPD = of_prompt_UKPD[end : end + count].sum(0)
            grad_LKD[start : start + unit.prompt_length] += of_prompt_KPD.transpose(0, 1)
            end += count
    return grad_LKD.to(dtype)
