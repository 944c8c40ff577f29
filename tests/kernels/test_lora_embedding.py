"""The embedding's LoRA function against plain autograd: repeated and padding tokens, dtypes, saved tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import embedding

from rankup.kernels.lora import Adapter, lora_embedding

V, D = 11, 5


def make_adapter(rank: int = 3, *, scaling: float = 0.7, dtype: torch.dtype = torch.float64, vocabulary: int = V) -> Adapter:
    """Random values; master weights in fp64 for fp64 operands, otherwise in fp32."""
    master_dtype = torch.promote_types(dtype, torch.float32)
    a, b = torch.randn(rank, vocabulary).to(dtype), torch.randn(D, rank).to(dtype)
    master_a = a.to(master_dtype, copy=True).requires_grad_()
    master_b = (b.to(master_dtype) / scaling).requires_grad_()
    return Adapter(master_a, master_b, a, b, scaling)


def published(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Adapter:
    """These master weights and the operands that publishing them would give."""
    return Adapter(a, b, a.detach(), scaling * b.detach(), scaling)


def plain(
    ids: torch.Tensor, embedded: torch.Tensor, adapter: Adapter, multiplier: float, padding_idx: int | None
) -> torch.Tensor:
    """PEFT's computation, from the master weights."""
    after_a = embedding(ids, adapter.master_a.t(), padding_idx=padding_idx)
    return embedded + multiplier * adapter.scaling * after_a @ adapter.master_b.t()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("multiplier", [1.0, 2.5])
def test_gradcheck(multiplier: float) -> None:
    ids = torch.tensor([[3, 1, 3], [10, 3, 0]])
    adapter = make_adapter()
    embedded = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)

    def function(embedded: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_embedding(ids, embedded, published(a, b, 0.7), multiplier=multiplier)

    assert torch.autograd.gradcheck(function, (embedded, adapter.master_a, adapter.master_b))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    rank=st.integers(1, 8),
    scaling=st.sampled_from([0.25, 1.0, 4.0]),
    multiplier=st.sampled_from([1.0, 3.0]),
    padding_idx=st.sampled_from([None, 0, 4]),
    by_token=st.booleans(),
)
def test_any_shape_equals_plain_autograd(
    shape: tuple[int, ...], rank: int, scaling: float, multiplier: float, padding_idx: int | None, by_token: bool
) -> None:
    """Few tokens, so that most of them repeat; `a` in memory as [R, V] and, as in vLLM, as [V, R] in a wider slot."""
    adapter = make_adapter(rank, scaling=scaling)
    if by_token:
        slot_VR = torch.full((V, 2 * rank), torch.nan, dtype=torch.float64)
        slot_VR[:, :rank] = adapter.a.t()
        adapter = Adapter(adapter.master_a, adapter.master_b, slot_VR.t()[:rank], adapter.b, scaling)
    ids = torch.randint(0, 6, shape)
    embedded = torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    ours = lora_embedding(ids, embedded, adapter, multiplier=multiplier, padding_idx=padding_idx)
    expected = plain(ids, embedded, adapter, multiplier, padding_idx)
    torch.testing.assert_close(ours, expected)
    grad, inputs = torch.randn_like(expected), (embedded, adapter.master_a, adapter.master_b)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_gradients_of_a_repeated_token_are_summed_in_fp32_and_deterministic() -> None:
    """In bf16 a sum of 4,096 equal terms would stop growing at 256 of them."""
    adapter = make_adapter(dtype=torch.bfloat16)
    ids, embedded = torch.full((4096,), 7), torch.zeros(4096, D).bfloat16()
    gradients = []
    for _ in range(2):
        y = lora_embedding(ids, embedded, adapter)
        gradients.append(torch.autograd.grad(y, (adapter.master_a, adapter.master_b), torch.ones_like(y)))
    assert gradients[0][0].dtype == gradients[0][1].dtype == torch.float32
    assert all(map(torch.equal, gradients[0], gradients[1]))
    expected = 4096 * (torch.ones(1, D).bfloat16() @ adapter.b).float()[0]
    torch.testing.assert_close(gradients[0][0][:, 7], expected)
    assert gradients[0][0].count_nonzero() == 3, "other tokens have no gradient"


def test_operands_that_change_before_the_backward_are_an_error() -> None:
    """Publishing between forward and backward would give gradients of neither policy: torch raises."""
    adapter = make_adapter()
    y = lora_embedding(torch.tensor([1, 2]), torch.randn(2, D, dtype=torch.float64), adapter)
    adapter.a.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_new_is_saved_for_the_backward() -> None:
    """Only tensors that existed before: the ids and the adapter."""
    adapter, ids = make_adapter(), torch.tensor([1, 2, 1])
    embedded = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_embedding(ids, embedded, adapter)
    known = {t.data_ptr() for t in (ids, adapter.a, adapter.b)}
    assert {t.data_ptr() for t in kept} == known


def test_bf16_is_as_accurate_as_the_plain_formulation() -> None:
    """Output and gradients against fp64 on the same bf16 numbers: at most 1.5 times the error of plain bf16 torch."""
    ids, adapter = torch.randint(0, 50, (200,)), make_adapter(8, scaling=1.0, dtype=torch.bfloat16, vocabulary=50)
    embedded, grad = torch.randn(200, D).bfloat16(), torch.randn(200, D).bfloat16()

    def plain_in(dtype: torch.dtype) -> list[torch.Tensor]:
        a, b = adapter.a.to(dtype).requires_grad_(), adapter.b.to(dtype).requires_grad_()
        y = plain(ids, embedded.to(dtype), Adapter(a, b, a, b, 1.0), 1.0, None)
        return [y, *torch.autograd.grad(y, (a, b), grad.to(dtype))]

    y = lora_embedding(ids, embedded, adapter)
    ours = [y, *torch.autograd.grad(y, (adapter.master_a, adapter.master_b), grad)]
    for one, theirs, exact in zip(ours, plain_in(torch.bfloat16), plain_in(torch.float64), strict=True):
        assert (one.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm() + 1e-12 * exact.norm()
