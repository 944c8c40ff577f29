"""One call of torch's kernels for a pack. On CPU a reference replaces them; the test marked `gpu` runs the real ones."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from attention_oracle import GROUPS, HEADS, Groups, pack_length, random_qkv, row_by_row_attention
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn

from rankup.kernels import attention_varlen
from rankup.kernels.attention_blocks import block_attention
from rankup.kernels.attention_plan import plan_blocks
from rankup.kernels.attention_varlen import plan_sequences, varlen_attention
from rankup.kernels.shared_prompt_attention import SharedPromptLayout, shared_prompt_attention


def varlen_by_definition(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`varlen_attn` as documented, sequence by sequence. Accepts exactly the same calls."""
    call = inspect.signature(varlen_attn).bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    left, right = a["window_size"]
    assert right == 0 and left >= -1, "causal, aligned at the end"
    assert a.get("enable_gqa", True) or a["query"].shape[1] == a["key"].shape[1]
    outputs = []
    starts = [a[name] for name in ("cu_seq_q", "cu_seq_k")]
    for t, longest in zip(starts, (a["max_q"], a["max_k"]), strict=True):
        assert t.dtype == torch.int32 and t.is_contiguous() and t.diff().max() == longest and t.diff().min() > 0
    assert [starts[0][-1], starts[1][-1]] == [len(a["query"]), len(a["key"])]
    for (q0, q1), (k0, k1) in zip(*(zip(t.tolist(), t[1:].tolist(), strict=False) for t in starts), strict=True):
        query, key, value = a["query"][q0:q1], a["key"][k0:k1], a["value"][k0:k1]
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * a["scale"]
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + (k1 - k0) - (q1 - q0))
        if left >= 0:
            hidden |= torch.ones_like(hidden).tril((k1 - k0) - (q1 - q0) - left - 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    return torch.cat(outputs)


varlen_by_definition.__signature__ = inspect.signature(varlen_attn)  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, heads=HEADS, window=st.none() | st.integers(1, 14))
@example(groups=[(1, [])], heads=(4, 2), window=None)
@example(groups=[(3, [0, 0]), (2, [0, 3, 0])], heads=(4, 2), window=2)
def test_equals_the_blocks(groups: Groups, heads: tuple[int, int], window: int | None) -> None:
    qkv = random_qkv(groups, *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_varlen, "varlen_attn", varlen_by_definition)
        output = varlen_attention(*qkv, plan_sequences(groups, window=window), 0.3)
    expected = block_attention(*qkv, plan_blocks(groups, *heads, window=window), 0.3)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, qkv, grad), torch.autograd.grad(expected, qkv, grad))


def test_without_the_keyword_for_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11, whose kernels allow them without it."""
    keywords: list[dict[str, Any]] = []

    def of_torch_2_11(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: None = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        keywords.append({"scale": scale, "window_size": window_size})
        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        return varlen_by_definition(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, **grouped
        )

    groups = [(3, [2, 4]), (1, [0])]
    qkv = random_qkv(groups, 4, 2)
    monkeypatch.setattr(attention_varlen, "varlen_attn", of_torch_2_11)
    output = varlen_attention(*qkv, plan_sequences(groups), 0.3)
    torch.testing.assert_close(output, block_attention(*qkv, plan_blocks(groups, 4, 2), 0.3))
    assert keywords == [{"scale": 0.3, "window_size": (-1, 0)}]


def test_plan_of_a_pack() -> None:
    plan = plan_sequences([(2, [3, 0, 1]), (1, [])])
    assert plan.query_starts.tolist() == [0, 2, 5, 6, 7]
    assert plan.key_starts.tolist() == [0, 2, 7, 10, 11]
    assert (plan.longest_query, plan.longest_key) == (3, 5)
    assert plan.keys.rows_N.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert plan.keys.length == 7


def test_plan_of_a_pack_with_a_window() -> None:
    """A completion's first token sees its prompt's last two, so no others are gathered."""
    plan = plan_sequences([(4, [3, 1]), (1, [2])], window=3)
    assert plan.keys.rows_N.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 2, 3, 7, 8, 8, 9, 10]
    assert (plan.window, plan.longest_query, plan.longest_key) == (3, 4, 5)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_torch_accepts_the_call(heads: tuple[int, int]) -> None:
    """Calls the real function, forward and backward, on meta tensors: arguments, shapes and dtypes."""
    groups = [(3, [2, 4]), (1, [0])]
    qkv = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in random_qkv(groups, *heads, dim=8)]
    query, key, value = qkv
    output = varlen_attention(query, key, value, plan_sequences(groups, "meta"), 0.3)
    assert (output.shape, output.dtype) == ((pack_length(groups), heads[0], 8), torch.bfloat16)
    for grad, t in zip(torch.autograd.grad(output, qkv, torch.empty_like(output)), qkv, strict=True):
        assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


def test_the_kernels_are_called_where_they_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [(3, [2, 4])]
    qkv = random_qkv(groups, 4, 2)
    calls = []

    @functools.wraps(varlen_by_definition)
    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return varlen_by_definition(*args, **kwargs)

    monkeypatch.setattr(attention_varlen, "is_available_for", lambda query: True)
    monkeypatch.setattr(attention_varlen, "varlen_attn", counted)
    output = shared_prompt_attention(*qkv, SharedPromptLayout.build(groups), None)
    assert len(calls) == 1, "one call for the pack"
    torch.testing.assert_close(output, row_by_row_attention(qkv, groups, 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [[(30, [20, 7, 33]), (11, [40, 0])], [(130, [63] * 8)], [(1, [1]), (5, [0])]])
@pytest.mark.parametrize(("heads", "dim"), [((9, 3), 64), ((4, 4), 128)])
def test_on_a_device(groups: Groups, heads: tuple[int, int], dim: int) -> None:
    """bf16 uses the kernels: at most 1.5 times the error of the blocks on CPU. fp32 uses the blocks on the device."""
    qkv = random_qkv(groups, *heads, dim=dim, dtype=torch.bfloat16)
    grad = torch.randn(pack_length(groups), heads[0], dim).bfloat16()

    def results(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.detach().to(device, dtype).requires_grad_() for t in qkv]
        query, key, value = inputs
        output = shared_prompt_attention(query, key, value, SharedPromptLayout.build(groups, device), None)
        grads = torch.autograd.grad(output, inputs, grad.to(device, dtype))
        return [t.double().cpu() for t in (output, *grads)]

    exact = results("cpu", torch.float64)
    on_cpu, on_device = results("cpu", torch.bfloat16), results("cuda", torch.bfloat16)
    for expected, ours, reference in zip(exact, on_device, on_cpu, strict=True):
        assert (ours - expected).norm() <= 1.5 * (reference - expected).norm()
    assert attention_varlen.is_available_for(qkv[0].cuda())
    for expected, ours in zip(exact, results("cuda", torch.float32), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
