"""The self-test of `rankup doctor`: its cases hold here, and a kernel that is wrong anywhere is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from rankup.grpo.cli.doctor.compare import Case, compare
from rankup.grpo.cli.doctor.kernels import MAKERS, Numbers

WITH_GRADIENTS = pytest.mark.parametrize("name", [name for name in MAKERS if name != "NF4"])
KERNELS = pytest.mark.parametrize("name", MAKERS)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def made(name: str, dtype: torch.dtype) -> Case:
    return MAKERS[name](Numbers("cpu", dtype))


@KERNELS
@DTYPES
def test_every_kernel_holds_here(name: str, dtype: torch.dtype) -> None:
    finding = compare(name, made(name, dtype))
    assert finding.level == "ok", finding
    assert 0 <= finding.figures["error"] <= finding.figures["bound"] < 0.02


class _OffBackward(torch.autograd.Function):
    """The same number; another gradient."""

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
    case = made(name, dtype)

    def wrong(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        changed = list(tensors)
        index = leaf % len(case.leaves)
        changed[index] = _OffBackward.apply(changed[index])  # type: ignore[assignment]
        return case.ours(*changed)

    assert compare(name, dataclasses.replace(case, ours=wrong)).level == "problem"


@KERNELS
@pytest.mark.parametrize(
    "spoil", [lambda y: y * 1.03, lambda y: y.masked_fill(torch.rand_like(y) < 0.01, 0.0), lambda y: y * torch.nan]
)
def test_a_result_that_is_wrong_is_found(name: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """All of it by three percent, a hundredth of it gone, or no numbers."""
    case = made(name, torch.bfloat16)
    torch.manual_seed(0)

    def wrong(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return [spoil(result.detach()) + (result - result.detach()) for result in case.ours(*tensors)]

    finding = compare(name, dataclasses.replace(case, ours=wrong))
    assert finding.level == "problem" and "do not train" in finding.note


def test_the_worst_of_several_results_is_told() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    case = Case(
        leaves=[x],
        constants=[],
        ours=lambda x: [x * 2, x * 3.3],
        plain=lambda x: [x * 2, x * 3],
    )
    finding = compare("triple", case)
    assert finding.level == "problem" and finding.figures["error"] == pytest.approx(0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KERNELS
@DTYPES
def test_on_a_gpu_every_kernel_holds(name: str, dtype: torch.dtype) -> None:
    finding = compare(name, MAKERS[name](Numbers("cuda", dtype)))
    assert finding.level == "ok", finding
