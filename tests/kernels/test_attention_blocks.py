"""The plan of units and blocks, and the arithmetic: independent of the blocks, and without quadratic memory."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import GROUPS, HEADS, Groups, pack_length, random_qkv, row_by_row_attention
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from rankup.kernels import attention_plan
from rankup.kernels.attention_blocks import block_attention
from rankup.kernels.attention_plan import BlockPlan, plan_blocks

LIMITS = st.sampled_from([1, 200, 1000, 3000])  # one row of 32 scores at a time, several, and complete units


def plan_with(
    groups: Groups, heads: tuple[int, int], *, scores_limit: int, padding_limit: int = 2**16, kept_limit: int = 0
) -> BlockPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "SCORES_LIMIT", scores_limit)
        patch.setattr(attention_plan, "PADDING_LIMIT", padding_limit)
        patch.setattr(attention_plan, "KEPT_LIMIT", kept_limit)
        return plan_blocks(groups, *heads)


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, heads=HEADS, scores_limit=LIMITS, padding_limit=st.sampled_from([0, 300, 2**16]))
def test_every_row_of_the_pack_is_assigned_once(
    groups: Groups, heads: tuple[int, int], scores_limit: int, padding_limit: int
) -> None:
    plan = plan_with(groups, heads, scores_limit=scores_limit, padding_limit=padding_limit)
    rows = torch.arange(pack_length(groups) * heads[1])
    assert torch.equal(plan.query_rows[plan.result_rows], rows)
    assert torch.equal(plan.key_rows[plan.own_rows], rows)
    places = torch.cat([plan.result_rows, plan.padding])
    assert torch.equal(places.sort().values, torch.arange(len(plan.query_rows)))
    if padding_limit == 0:
        assert len(plan.padding) == 0


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, heads=HEADS, scores_limit=LIMITS)
def test_scores_stay_within_the_limit(groups: Groups, heads: tuple[int, int], scores_limit: int) -> None:
    plan = plan_with(groups, heads, scores_limit=scores_limit)
    for block in plan.blocks():
        tokens = block.unit.count * (block.stop - block.start)
        assert tokens * heads[0] * block.columns <= scores_limit or tokens == 1
        assert block.columns % attention_plan.COLUMNS == 0
    assert sum(unit.width * unit.count for unit in plan.units) >= pack_length(groups)


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, heads=HEADS, scores_limit=LIMITS, padding_limit=st.sampled_from([0, 300, 2**16]))
@example(groups=[(40, [50, 3]), (70, [])], heads=(4, 2), scores_limit=1000, padding_limit=0)
def test_blocks_do_not_change_the_result(
    groups: Groups, heads: tuple[int, int], scores_limit: int, padding_limit: int
) -> None:
    qkv = random_qkv(groups, *heads)
    plans = [
        plan_with(groups, heads, scores_limit=2**22),
        plan_with(groups, heads, scores_limit=scores_limit, padding_limit=padding_limit),
    ]
    grad = torch.randn(pack_length(groups), heads[0], 4, dtype=torch.float64)
    results = []
    for plan in plans:
        output = block_attention(*qkv, plan, 0.4)
        results.append((output, *torch.autograd.grad(output, qkv, grad)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_a_tiny_limit_splits_sequences() -> None:
    """Makes sure that the other tests run with more than one block."""
    groups = [(3, [2, 4, 4])]
    assert len(list(plan_with(groups, (4, 2), scores_limit=2**22).blocks())) == 2
    apart = plan_with(groups, (4, 2), scores_limit=2 * 4 * 32)
    assert apart.is_cut and [(b.start, b.stop) for b in apart.blocks()] == [(0, 2), (2, 3), *[(0, 2), (2, 4)] * 2, (0, 2)]


def test_sequences_of_different_lengths_are_in_different_units() -> None:
    groups = [(1, [2, 30, 29, 0, 3])]
    plan = plan_with(groups, (1, 1), scores_limit=2**22, padding_limit=100)  # 32 scores a token: room for three of padding
    assert [(unit.prompt_length, unit.count, unit.width) for unit in plan.units] == [(0, 1, 1), (1, 2, 30), (1, 2, 3)]


def test_completions_behind_prompts_of_one_length_are_computed_together() -> None:
    """In the pack's order, so that those behind one prompt are next to each other."""
    plan = plan_with([(3, [4, 2]), (2, [4]), (3, [0]), (3, [3, 4])], (1, 1), scores_limit=2**22)
    assert [(unit.prompt_length, unit.count, unit.width) for unit in plan.units] == [(0, 4, 3), (3, 4, 4), (2, 1, 4)]
    assert [unit.prompts for unit in plan.units[1:]] == [((0, 2), (18, 2)), ((9, 1),)]


@pytest.mark.parametrize("scores_limit", [2**22, 200])
@pytest.mark.parametrize("groups", [[(3, [2, 4, 2])], [(1, [0]), (2, [3])], [(2, [3, 1]), (2, [2])]])
def test_gradcheck(groups: Groups, scores_limit: int) -> None:
    plan = plan_with(groups, (4, 2), scores_limit=scores_limit)
    qkv = random_qkv(groups, 4, 2, dim=3)
    assert torch.autograd.gradcheck(lambda q, k, v: block_attention(q, k, v, plan, 0.6), qkv)


@pytest.mark.parametrize("scores_limit", [2**22, 200])
def test_only_query_key_and_value_are_saved_for_the_backward(scores_limit: int) -> None:
    groups = [(5, [9, 9, 2])]
    plan = plan_with(groups, (4, 2), scores_limit=scores_limit)
    qkv = random_qkv(groups, 4, 2)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block_attention(*qkv, plan, 0.5)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in qkv]


@pytest.mark.parametrize("scores_limit", [2**22, 200])
def test_small_weights_are_saved_without_changing_gradients(scores_limit: int) -> None:
    groups = [(5, [9, 9, 2])]
    qkv = random_qkv(groups, 4, 2)
    count = 4 * 32 * (5 + 9 + 9 + 2)  # heads, a row of up to 32 keys, padded, and tokens
    gradients = []
    for kept_limit in (count - 1, count):
        plan = plan_with(groups, (4, 2), scores_limit=scores_limit, padding_limit=0, kept_limit=kept_limit)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            output = block_attention(*qkv, plan, 0.5)
        assert sum(t.numel() for t in kept[3:]) == (count if kept_limit == count else 0)
        gradients.append(torch.autograd.grad(output.square().sum(), qkv))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_gradients_under_gradient_checkpointing() -> None:
    groups = [(3, [2, 4]), (2, [5])]
    plan = plan_with(groups, (4, 2), scores_limit=2**22)
    qkv = random_qkv(groups, 4, 2)
    expected = torch.autograd.grad(block_attention(*qkv, plan, 0.5).square().sum(), qkv)
    output = checkpoint(lambda q, k, v: block_attention(q, k, v, plan, 0.5), *qkv, use_reentrant=False)
    assert isinstance(output, torch.Tensor)
    for found, wanted in zip(torch.autograd.grad(output.square().sum(), qkv), expected, strict=True):
        assert torch.equal(found, wanted)


def test_heads_first_in_memory_gives_the_same() -> None:
    groups = [(3, [2, 4])]
    plan = plan_with(groups, (4, 2), scores_limit=2**22)
    qkv = query, key, value = random_qkv(groups, 4, 2)
    output = block_attention(query, key, value, plan, 0.5)
    assert torch.equal(block_attention(query.contiguous(), key.contiguous(), value.contiguous(), plan, 0.5), output)
    grad = torch.randn(*output.shape, 2, dtype=torch.float64)[..., 0]  # a gradient with gaps between its elements
    expected = torch.autograd.grad(row_by_row_attention(qkv, groups, 0.5), qkv, grad)
    torch.testing.assert_close(torch.autograd.grad(output, qkv, grad), expected)


def test_weights_are_finite_for_scores_of_any_size() -> None:
    """No row may have only padding and masked scores, and large scores must not overflow."""
    groups = [(4, [3, 1, 5])]
    query, key, value = random_qkv(groups, 4, 2, dtype=torch.float32)
    qkv = (query.detach() * 1e4, key.detach(), value.detach())
    output = block_attention(*qkv, plan_with(groups, (4, 2), scores_limit=2**22), 0.5)
    assert output.isfinite().all()
    torch.testing.assert_close(output, row_by_row_attention(qkv, groups, 0.5))
