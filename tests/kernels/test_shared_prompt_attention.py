"""Attention over packs of shared prompts, against plain attention with an explicit mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rankup.kernels import shared_prompt_attention as attention
from rankup.kernels.shared_prompt_attention import SharedPromptLayout, shared_prompt_attention, transformers_attention

Groups = list[tuple[int, list[int]]]

GROUPS = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=3)


def visible(groups: Groups) -> torch.Tensor:
    """Mask [L, L], True where the row's token sees the column's, written as the layout is described in words."""
    kinds = []  # of each token: (group, completion or None for the prompt)
    for index, (prompt_length, completion_lengths) in enumerate(groups):
        kinds += [(index, None)] * prompt_length
        kinds += [(index, number) for number, length in enumerate(completion_lengths) for _ in range(length)]
    return torch.tensor(
        [
            [
                column <= row and kind[0] == other[0] and other[1] in (None, kind[1])
                for column, other in enumerate(kinds)
            ]
            for row, kind in enumerate(kinds)
        ]
    )


def masked_attention(
    query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, mask_LL: torch.Tensor, scaling: float
) -> torch.Tensor:
    repeats = query_HLD.shape[0] // key_KLD.shape[0]
    key_HLD, value_HLD = (t.repeat_interleave(repeats, dim=0) for t in (key_KLD, value_KLD))
    scores = (query_HLD @ key_HLD.transpose(1, 2) * scaling).masked_fill(~mask_LL, float("-inf"))
    return (scores.softmax(-1) @ value_HLD).transpose(0, 1)


def make_inputs(
    length: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return tuple(  # type: ignore[return-value]
        torch.randn(count, length, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )


@settings(deadline=None, max_examples=80)
@given(
    groups=GROUPS,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    scaling=st.sampled_from([None, 0.3]),
    scores_limit=st.sampled_from([attention.SCORES_LIMIT, 0, 40]),  # outright, torch's kernel, and some of each
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@example([(1, [])], (4, 2), None, attention.SCORES_LIMIT, torch.float64)
@example([(3, [4])], (4, 2), None, attention.SCORES_LIMIT, torch.float64)
@example([(3, [0, 0]), (2, [0, 3, 0])], (4, 2), None, 0, torch.float64)
def test_equals_attention_with_an_explicit_mask(
    groups: Groups, heads: tuple[int, int], scaling: float | None, scores_limit: int, dtype: torch.dtype
) -> None:
    layout = SharedPromptLayout.build(groups)
    inputs = make_inputs(layout.length, *heads, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES_LIMIT", scores_limit)
        output = shared_prompt_attention(*inputs, layout, scaling)
    expected = masked_attention(*inputs, visible(groups), 0.5 if scaling is None else scaling)  # 4 ** -0.5
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_both_ways_to_attend_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit decides; a test of the one path that ran the other would prove nothing."""
    calls = []
    kernel = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
    )
    layout = SharedPromptLayout.build([(3, [2, 4])])
    inputs = make_inputs(layout.length, 4, 2)
    for limit, expected in [(attention.SCORES_LIMIT, 0), (2 * 4 * 4 * 7, 0), (2 * 4 * 4 * 7 - 1, 1), (0, 2)]:
        monkeypatch.setattr(attention, "SCORES_LIMIT", limit)
        calls.clear()
        shared_prompt_attention(*inputs, layout, None)
        assert len(calls) == expected


@pytest.mark.parametrize(("scores_limit", "plain"), [(attention.SCORES_LIMIT, "eager"), (0, "sdpa")])
def test_bf16_is_as_exact_as_the_plain_formulation(scores_limit: int, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64 on the same bf16 numbers: at most 1.5 times the error of transformers' eager attention (scores in bf16),
    or of torch's kernel (scores in fp32), with the explicit mask."""
    monkeypatch.setattr(attention, "SCORES_LIMIT", scores_limit)
    groups = [(30, [20, 7, 33]), (11, [40])]
    layout, mask_LL = SharedPromptLayout.build(groups), visible(groups)
    query, key, value = inputs = make_inputs(layout.length, 4, 2, torch.bfloat16)
    exact = masked_attention(query.double(), key.double(), value.double(), mask_LL, 0.5)
    if plain == "eager":
        expected = masked_attention(*inputs, mask_LL, 0.5)
    else:
        batched = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask_LL, enable_gqa=True)
        expected = batched[0].transpose(0, 1)
    ours = shared_prompt_attention(*inputs, layout, None)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= 1.5 * (expected.double() - exact).norm()


def test_layout_says_where_every_token_is() -> None:
    layout = SharedPromptLayout.build([(2, [3, 0, 1]), (1, [])])
    first, second = layout.groups
    assert (layout.length, first.prompt, first.completions) == (7, slice(0, 2), slice(2, 6))
    assert first.padded_GC.tolist() == [[2, 3, 4], [0, 0, 0], [5, 0, 0]]
    assert first.padded_GC.flatten()[first.real].tolist() == [2, 3, 4, 5]
    assert (second.prompt, second.completions) == (slice(6, 7), slice(7, 7))


def test_as_transformers_calls_it() -> None:
    groups = [(3, [2, 4])]
    layout = SharedPromptLayout.build(groups)
    inputs = make_inputs(layout.length, 4, 2)
    query, key, value = (t[None] for t in inputs)
    module = torch.nn.Module()
    output, weights = transformers_attention(
        module, query, key, value, None, shared_prompt_layout=layout, scaling=0.3, sliding_window=None, is_causal=True
    )
    assert output.shape == (1, layout.length, 4, 4) and weights is None
    torch.testing.assert_close(output[0], masked_attention(*inputs, visible(groups), 0.3))
    with pytest.raises(AssertionError, match="one pack at a time"):
        transformers_attention(module, query[:, :, 1:], key, value, None, shared_prompt_layout=layout)
    with pytest.raises(AssertionError, match="dropout"):
        transformers_attention(module, query, key, value, None, shared_prompt_layout=layout, dropout=0.1)
