"""Gathering rows of which some are repeated: sums in fp32, in a fixed order, for any index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankup.kernels.repeated_rows import RowCopies

INDEX = st.integers(1, 6).flatmap(lambda length: st.tuples(st.lists(st.integers(0, length - 1), max_size=20), st.just(length)))


def gradient_of(index: list[int], grad: torch.Tensor, length: int) -> torch.Tensor:
    rows = torch.zeros(length, *grad.shape[1:], dtype=grad.dtype, device=grad.device, requires_grad=True)
    return torch.autograd.grad(RowCopies(index, length, grad.device).gather(rows), rows, grad)[0]


@settings(deadline=None, max_examples=60)
@given(case=INDEX)
@example(case=([], 3))
@example(case=([2, 2, 2], 3))
def test_equals_index_select(case: tuple[list[int], int]) -> None:
    index, length = case
    rows = torch.randn(length, 3, 2, dtype=torch.float64, requires_grad=True)
    ours, torchs = RowCopies(index, length).gather(rows), rows.index_select(0, torch.tensor(index, dtype=torch.long))
    assert torch.equal(ours, torchs)
    grad = torch.randn_like(torchs)
    torch.testing.assert_close(*(torch.autograd.grad(result, rows, grad) for result in (ours, torchs)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_summed_in_fp32(device: str) -> None:
    """256 and 102 times 1, which a sum in bf16 would leave at 256."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    grad = torch.ones(104, 5, dtype=torch.bfloat16, device=device)
    grad[0] = 256.0
    sums = gradient_of([1] * 103 + [0], grad, 3)
    assert sums.dtype == torch.bfloat16
    assert [row.unique().tolist() for row in sums] == [[1.0], [358.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_added_in_the_order_of_their_places(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 7, (60,), generator=generator).tolist()
    grad = torch.randn(60, 4, generator=generator).to(dtype)
    expected = torch.zeros(7, 4)
    for row, value in zip(index, grad, strict=True):
        expected[row] += value
    assert torch.equal(gradient_of(index, grad, 7), expected.to(dtype))


def test_a_gradient_that_is_not_contiguous() -> None:
    grad = torch.randn(3, dtype=torch.float64).expand(4, 3)
    assert torch.equal(gradient_of([0, 1, 1, 1], grad, 2), torch.stack([grad[0], grad[0] + grad[0] + grad[0]]))


def test_gradcheck() -> None:
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: RowCopies([2, 0, 2, 2], 3).gather(t), (rows,))
