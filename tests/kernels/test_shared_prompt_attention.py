"""Attention over packs of shared prompts, called by trainer and transformers, against plain attention row by row."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import GROUPS, HEADS, Groups, masked_attention, pack_length, random_qkv, row_by_row_attention, visible
from hypothesis import example, given, settings

from rankup.kernels import attention_plan, attention_varlen
from rankup.kernels.shared_prompt_attention import SharedPromptLayout, shared_prompt_attention, transformers_attention


@settings(deadline=None, max_examples=20)
@given(groups=GROUPS)
def test_the_two_oracles_agree(groups: Groups) -> None:
    qkv = random_qkv(groups, 4, 2)
    torch.testing.assert_close(masked_attention(qkv, visible(groups), 0.5), row_by_row_attention(qkv, groups, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scaling", [None, 0.3])
@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, heads=HEADS)
@example(groups=[(1, [])], heads=(4, 2))
@example(groups=[(3, [4])], heads=(4, 2))
@example(groups=[(3, [0, 0]), (2, [0, 3, 0])], heads=(4, 2))
def test_equals_attention_row_by_row(
    groups: Groups, heads: tuple[int, int], scaling: float | None, dtype: torch.dtype
) -> None:
    qkv = random_qkv(groups, *heads, dtype=dtype)
    output = shared_prompt_attention(*qkv, SharedPromptLayout.build(groups), scaling)
    assert output.dtype == dtype and output.shape == (pack_length(groups), heads[0], 4)
    expected = row_by_row_attention(qkv, groups, 0.5 if scaling is None else scaling)  # 4 ** -0.5
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, qkv, grad), torch.autograd.grad(expected, qkv, grad))


@pytest.mark.parametrize("scores_limit", [attention_plan.SCORES_LIMIT, 4000])
@pytest.mark.parametrize("groups", [[(30, [20, 7, 33]), (11, [40])], [(24, [31] * 8)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_the_plain_formulation(
    groups: Groups, dtype: torch.dtype, scores_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients against fp64 on the same values: at most 1.5 times the error of transformers' eager attention."""
    monkeypatch.setattr(attention_plan, "SCORES_LIMIT", scores_limit)
    qkv = random_qkv(groups, 6, 2, dim=16, dtype=dtype)
    exact_qkv = (qkv[0].double(), qkv[1].double(), qkv[2].double())
    exact = row_by_row_attention(exact_qkv, groups, 0.25)
    plain = masked_attention(qkv, visible(groups), 0.25)
    ours = shared_prompt_attention(*qkv, SharedPromptLayout.build(groups), None)
    assert ours.dtype == dtype
    grad = torch.randn_like(ours)
    results = [
        (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))
        for out, inputs in ((exact, exact_qkv), (plain, qkv), (ours, qkv))
    ]
    for name, exact_t, plain_t, our_t in zip(("output", "query", "key", "value"), *results, strict=True):
        error, allowed = (our_t.double() - exact_t).norm(), 1.5 * (plain_t.double() - exact_t).norm()
        assert error <= allowed, (name, (error / allowed).item())


def test_the_flash_kernels_are_not_used_on_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not attention_varlen.is_available_for(torch.zeros(4, 3, 64, dtype=dtype))


def test_the_layout_of_a_pack() -> None:
    layout = SharedPromptLayout.build([(2, [3, 0, 1]), (1, [])])
    first, second = layout.groups
    assert layout.length == 7
    assert (first.prompt, first.completions) == (slice(0, 2), (slice(2, 5), slice(5, 5), slice(5, 6)))
    assert (second.prompt, second.completions) == (slice(6, 7), ())
    with pytest.raises(AssertionError, match="at least one token"):
        SharedPromptLayout.build([(0, [3])])


def test_a_layout_is_planned_once_for_all_layers() -> None:
    layout = SharedPromptLayout.build([(2, [3, 1])])
    assert layout.block_plan(4, 2) is layout.block_plan(4, 2)
    assert layout.block_plan(4, 2) is not layout.block_plan(4, 4)
    assert layout.sequence_plan is layout.sequence_plan


def test_calls_by_transformers() -> None:
    groups = [(3, [2, 4])]
    layout = SharedPromptLayout.build(groups)
    qkv = random_qkv(groups, 4, 2)
    query, key, value = (t[None] for t in qkv)
    module = torch.nn.Module()
    output, weights = transformers_attention(
        module, query, key, value, None, shared_prompt_layout=layout, scaling=0.3, sliding_window=None, is_causal=True
    )
    assert output.shape == (1, layout.length, 4, 4) and weights is None
    torch.testing.assert_close(output[0], row_by_row_attention(qkv, groups, 0.3))
    with pytest.raises(AssertionError, match="one pack at a time"):
        transformers_attention(module, query[:, :, 1:], key, value, None, shared_prompt_layout=layout)
    with pytest.raises(AssertionError, match="dropout"):
        transformers_attention(module, query, key, value, None, shared_prompt_layout=layout, dropout=0.1)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_another_kind_of_attention_is_an_error(keyword: str) -> None:
    t = torch.zeros(1, 2, 3, 4)
    layout = SharedPromptLayout.build([(3, [])])
    with pytest.raises(ValueError, match=f"^Linear uses attention with {keyword}: "):
        transformers_attention(
            torch.nn.Linear(1, 1), t, t, t, None, shared_prompt_layout=layout, **{keyword: 1.0}
        )
