"""Attention over packs of shared prompts, called by trainer and transformers, against plain attention row by row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_oracle import (
    GROUPS,
    HEADS,
    PLAIN,
    Groups,
    Kind,
    masked_attention,
    pack_length,
    random_qkv,
    row_by_row_attention,
    visible,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankup.kernels import attention_plan, attention_varlen
from rankup.kernels.shared_prompt_attention import (
    SharedPromptLayout,
    active,
    shared_prompt_attention,
    transformers_attention,
)


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
def test_equals_attention_row_by_row(groups: Groups, heads: tuple[int, int], scaling: float | None, dtype: torch.dtype) -> None:
    qkv = random_qkv(groups, *heads, dtype=dtype)
    output = shared_prompt_attention(*qkv, SharedPromptLayout.build(groups), scaling)
    assert output.dtype == dtype and output.shape == (pack_length(groups), heads[0], 4)
    expected = row_by_row_attention(qkv, groups, 0.5 if scaling is None else scaling)  # 4 ** -0.5
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, qkv, grad), torch.autograd.grad(expected, qkv, grad))


@pytest.mark.parametrize("scores_limit", [attention_plan.SCORES_LIMIT, 1000])
@settings(deadline=None, max_examples=60)
@given(
    groups=GROUPS,
    heads=HEADS,
    window=st.none() | st.integers(1, 14),
    softcap=st.sampled_from([None, 0.5, 20.0]),
    sinks=st.booleans(),
    value_dim=st.sampled_from([4, 3]),
)
@example(groups=[(6, [5, 6]), (2, [])], heads=(4, 2), window=1, softcap=None, sinks=False, value_dim=4)
@example(groups=[(40, [90, 3]), (150, [7])], heads=(4, 2), window=5, softcap=None, sinks=False, value_dim=4)
@example(groups=[(70, [200, 3]), (150, [7])], heads=(6, 2), window=40, softcap=1.0, sinks=True, value_dim=3)
def test_windows_caps_sinks_and_narrow_values_equal_attention_row_by_row(
    groups: Groups,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    sinks: bool,
    value_dim: int,
    scores_limit: int,
) -> None:
    query, key, value = random_qkv(groups, *heads)
    qkv = (query, key, value.detach()[..., :value_dim].clone().requires_grad_())
    kind = Kind(window, softcap, torch.linspace(-1.5, 3.0, heads[0], dtype=torch.float64) if sinks else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "SCORES_LIMIT", scores_limit)
        layout = SharedPromptLayout.build(groups)
        output = shared_prompt_attention(*qkv, layout, 0.7, window=window, softcap=softcap, sinks_H=kind.sinks_H)
    expected = row_by_row_attention(qkv, groups, 0.7, kind)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, qkv, grad), torch.autograd.grad(expected, qkv, grad))


KINDS = [PLAIN, Kind(softcap=3.0), Kind(sinks_H=torch.linspace(-1.0, 2.0, 6))]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("scores_limit", [attention_plan.SCORES_LIMIT, 4000])
@pytest.mark.parametrize("groups", [[(30, [20, 7, 33]), (11, [40])], [(24, [31] * 8)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_the_plain_formulation(
    groups: Groups, dtype: torch.dtype, scores_limit: int, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients against fp64 on the same values: at most 1.5 times the error of transformers' eager attention."""
    monkeypatch.setattr(attention_plan, "SCORES_LIMIT", scores_limit)
    qkv = random_qkv(groups, 6, 2, dim=16, dtype=dtype)
    exact_qkv = (qkv[0].double(), qkv[1].double(), qkv[2].double())
    exact = row_by_row_attention(exact_qkv, groups, 0.25, kind)
    plain = masked_attention(qkv, visible(groups), 0.25, kind)
    ours = shared_prompt_attention(*qkv, SharedPromptLayout.build(groups), None, softcap=kind.softcap, sinks_H=kind.sinks_H)
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
    assert layout.sequence_plan() is layout.sequence_plan()
    assert layout.block_plan(4, 2, 4) is layout.block_plan(4, 2, 4)
    assert layout.block_plan(4, 2, 4) is not layout.block_plan(4, 2)
    assert layout.block_plan(4, 2, 5) is layout.block_plan(4, 2), "no sequence is longer than the window"
    assert layout.sequence_plan(5) is layout.sequence_plan()


def test_calls_by_transformers() -> None:
    groups = [(3, [2, 4])]
    layout = SharedPromptLayout.build(groups)
    qkv = random_qkv(groups, 4, 2)
    query, key, value = (t[None] for t in qkv)
    module = torch.nn.Module()
    with active(layout):
        output, weights = transformers_attention(
            module, query, key, value, None, scaling=0.3, sliding_window=None, is_causal=True
        )
        with pytest.raises(AssertionError, match="one pack at a time"):
            transformers_attention(module, query[:, :, 1:], key, value, None)
        with pytest.raises(AssertionError, match="dropout"):
            transformers_attention(module, query, key, value, None, dropout=0.1)
    assert output.shape == (1, layout.length, 4, 4) and weights is None
    torch.testing.assert_close(output[0], row_by_row_attention(qkv, groups, 0.3))


def test_one_pack_at_a_time() -> None:
    layout, t = SharedPromptLayout.build([(3, [])]), torch.zeros(1, 2, 3, 4)
    with active(layout), pytest.raises(AssertionError, match="one pack at a time"), active(layout):
        pass
    with active(None), pytest.raises(AssertionError, match="within `active`"):
        transformers_attention(torch.nn.Module(), t, t, t, None)


class Layer(torch.nn.Module):
    """What attention layers of transformers say of themselves."""

    def __init__(self, layer_idx: int, kinds: list[str] | None) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, SimpleNamespace(layer_types=kinds, sliding_window=4)


@pytest.mark.parametrize(
    ("layer", "given", "window"),
    [
        (Layer(0, None), None, None),  # as models whose configuration has a window that they do not use
        (Layer(0, None), 3, 3),
        (Layer(1, ["full_attention", "sliding_attention"]), 4, 4),
        (Layer(1, ["full_attention", "sliding_attention"]), None, 4),  # which the model's mask would say
        (Layer(0, ["full_attention", "sliding_attention"]), None, None),
    ],
)
def test_the_window_of_a_layer(layer: Layer, given: int | None, window: int | None) -> None:
    groups = [(6, [5, 3])]
    qkv = random_qkv(groups, 4, 2)
    query, key, value = (t[None] for t in qkv)
    with active(SharedPromptLayout.build(groups)):
        output, _ = transformers_attention(layer, query, key, value, None, scaling=0.3, sliding_window=given)
    torch.testing.assert_close(output[0], row_by_row_attention(qkv, groups, 0.3, Kind(window)))


def test_caps_and_sinks_come_from_transformers() -> None:
    groups = [(6, [5, 3])]
    qkv = random_qkv(groups, 4, 2)
    query, key, value = (t[None] for t in qkv)
    kind = Kind(softcap=0.4, sinks_H=torch.linspace(-1.0, 1.0, 4, dtype=torch.float64))
    with active(SharedPromptLayout.build(groups)):
        output, _ = transformers_attention(
            torch.nn.Module(), query, key, value, None, scaling=0.3, softcap=0.4, s_aux=kind.sinks_H
        )
    torch.testing.assert_close(output[0], row_by_row_attention(qkv, groups, 0.3, kind))


def test_windows_that_contradict_each_other_are_an_error() -> None:
    t = torch.zeros(1, 2, 3, 4)
    said = r"^Layer 0 asks for a window of 4, its configuration for None: "
    with active(SharedPromptLayout.build([(3, [])])), pytest.raises(ValueError, match=said):
        transformers_attention(Layer(0, ["full_attention"]), t, t, t, None, sliding_window=4)


def test_another_kind_of_attention_is_an_error() -> None:
    t = torch.zeros(1, 2, 3, 4)
    said = r"^Linear uses attention with position_bias: "
    with active(SharedPromptLayout.build([(3, [])])), pytest.raises(ValueError, match=said):
        transformers_attention(torch.nn.Linear(1, 1), t, t, t, None, position_bias=t)
