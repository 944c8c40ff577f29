"""The kernels' self-test: every case passes on this machine, and any wrong kernel is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from rankup.kernels.self_test import CASES, Case, compare, make_case, self_test

WITH_GRADIENTS = pytest.mark.parametrize("name", [name for name in CASES if name != "NF4"])
KERNELS = pytest.mark.parametrize("name", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@KERNELS
@DTYPES
def test_every_kernel_passes_here(name: str, dtype: torch.dtype) -> None:
    result = self_test(name, dtype, "cpu")
    assert result.passed, result
    assert 0 <= result.error <= result.bound < 0.02


class _OffBackward(torch.autograd.Function):
    """The identity with a gradient that is 5 % too large."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 1.05


@WITH_GRADIENTS
@DTYPES
@pytest.mark.parametrize("leaf", [0, -1])
def test_a_gradient_that_is_five_percent_off_is_found(name: str, dtype: torch.dtype, leaf: int) -> None:
    case = make_case(name, dtype, "cpu")
    index = [i for i, tensor in enumerate(case.inputs) if tensor.requires_grad][leaf]

    def wrong(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        changed = list(tensors)
        changed[index] = _OffBackward.apply(changed[index])  # type: ignore[assignment]
        return case.kernel(*changed)

    assert not compare(dataclasses.replace(case, kernel=wrong)).passed


@KERNELS
@pytest.mark.parametrize(
    "spoil", [lambda y: y * 1.03, lambda y: y.masked_fill(torch.rand_like(y) < 0.01, 0.0), lambda y: y * torch.nan]
)
def test_a_wrong_result_is_found(name: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """All values 3 % off, 1 % of them zero, or all NaN."""
    case = make_case(name, torch.bfloat16, "cpu")
    torch.manual_seed(0)

    def wrong(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return [spoil(result.detach()) + (result - result.detach()) for result in case.kernel(*tensors)]

    assert not compare(dataclasses.replace(case, kernel=wrong)).passed


def test_the_worst_of_several_results_is_returned() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    result = compare(Case([x], kernel=lambda x: [x * 2, x * 3.3], reference=lambda x: [x * 2, x * 3]))
    assert not result.passed and result.error == pytest.approx(0.1)


def test_a_nan_is_not_hidden_by_other_results() -> None:
    x = torch.ones(8)
    for kernel in (lambda x: [x * torch.nan, x], lambda x: [x, x * torch.nan]):
        assert not compare(Case([x], kernel=kernel, reference=lambda x: [x, x])).passed


def test_a_reference_that_is_nan_passes_nothing() -> None:
    x = torch.ones(8)
    assert not compare(Case([x], kernel=lambda x: [x * torch.nan], reference=lambda x: [x * torch.nan])).passed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KERNELS
@DTYPES
def test_on_a_gpu_every_kernel_passes(name: str, dtype: torch.dtype) -> None:
    result = self_test(name, dtype, "cuda")
    assert result.passed, result
