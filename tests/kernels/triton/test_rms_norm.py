"""RMSNorm by kernels: against plain autograd in fp64, with transformers' rounding, and compiled for three chips."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ahead_of_time import compile_for, pairwise

from rankup.kernels import rms_norm as norms
from rankup.kernels.rms_norm import WIDEST, rms_norm
from rankup.kernels.triton.rms_norm import (
    backward_arguments,
    backward_kernel,
    forward_arguments,
    forward_kernel,
)

EPS = 1e-5
interpreted = pytest.mark.interpreted


# ---------------------------------------------------------------------------------------------------------- interpreted


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device."""
    monkeypatch.setattr(norms, "runs_triton", lambda *_: True)


def plain(x: torch.Tensor, weight: torch.Tensor, *, unit_offset: bool) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (weight + 1 if unit_offset else weight)


def assert_equals_plain_autograd(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, *, unit_offset: bool) -> None:
    exact_x = x.detach().double().requires_grad_()
    expected = plain(exact_x, weight.double(), unit_offset=unit_offset)
    (expected_dx,) = torch.autograd.grad(expected, exact_x, grad.double())
    y = rms_norm(x, weight, EPS, unit_offset=unit_offset)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close((y.detach(), dx), (expected.detach().float(), expected_dx.float()))


@interpreted
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5,), (3, 7, 123), (2, 0, 5), (33, 128), (1, 4096), (2, 5000), (1, WIDEST)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_any_shape_equals_plain_autograd(shape: tuple[int, ...], unit_offset: bool) -> None:
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    assert_equals_plain_autograd(x, grad, torch.randn(shape[-1]), unit_offset=unit_offset)


@interpreted
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :, 8:24],  # heads of a product of q, k and v
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(1, 2),
        lambda t: t[..., ::2],
        lambda t: t[:1].expand(3, -1, -1),
    ],
)
def test_views_are_not_copied(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, grad = view(torch.randn(4, 5, 32)).requires_grad_(), view(torch.randn(4, 5, 32))
    assert_equals_plain_autograd(x, grad, torch.randn(2 * x.shape[-1])[::2], unit_offset=False)


@interpreted
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_rows_of_zeros_and_large_rows_are_finite(scale: float) -> None:
    x = (scale * torch.randn(3, 50)).requires_grad_()
    assert_equals_plain_autograd(x, torch.randn(3, 50), torch.randn(50), unit_offset=False)


@interpreted
@pytest.mark.parametrize("unit_offset", [False, True])
def test_fp16_is_rounded_where_transformers_rounds(monkeypatch: pytest.MonkeyPatch, unit_offset: bool) -> None:
    assert_as_exact_as_torch(monkeypatch, 252, 96, torch.float16, "cpu", unit_offset=unit_offset)


def assert_as_exact_as_torch(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, dtype: torch.dtype, device: str, *, unit_offset: bool
) -> None:
    """All but a few values are bit-exact with torch; the gradient's error is at most torch's."""
    x, grad, weight = (torch.randn(*size).to(device, dtype) for size in ((rows, width), (rows, width), (width,)))
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr(norms, "runs_triton", lambda *_, has_kernel=has_kernel: has_kernel)
        leaf = x.clone().requires_grad_()
        y = rms_norm(leaf, weight, EPS, unit_offset=unit_offset)
        results.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    (torch_y, torch_dx), (y, dx) = results
    assert (y != torch_y).double().mean() < 1e-3
    exact_x = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(exact_x, weight.double(), unit_offset=unit_offset), exact_x, grad.double())
    assert (dx.double() - exact).norm() <= 1.1 * (torch_dx.double() - exact).norm()


# --------------------------------------------------------------------------------------------------------- ahead of time


@pytest.mark.parametrize(
    ("capability", "width", "unit_offset"), pairwise([80, 90, 100], [128, 896, 4096, WIDEST], [False, True])
)
def test_builds_stay_in_registers(capability: int, width: int, unit_offset: bool) -> None:
    x = torch.empty(4096, width, dtype=torch.bfloat16, device="meta")
    weight, inverse_rms = torch.empty(width, dtype=x.dtype, device="meta"), torch.empty(4096, 1, device="meta")
    forward = forward_arguments(x, inverse_rms, x, weight, EPS, unit_offset=unit_offset)
    backward = backward_arguments(x, x, x, weight, inverse_rms, unit_offset=unit_offset)
    for kernel, arguments in ((forward_kernel, forward), (backward_kernel, backward)):
        build = compile_for(capability, kernel, **arguments)
        assert build.fits and (build.stack, build.local) == (0, 0)
        assert not build.count("atom") and not build.count("red"), "sums in one order"
        assert build.count("ld.global.v4"), "16 bytes at a time"


def test_without_a_device_torch_computes() -> None:
    assert not norms._has_kernel(torch.zeros(2, 3), torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [128, 896, pytest.param(4096, marks=pytest.mark.large), WIDEST])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_on_a_gpu_it_is_as_accurate_as_torch(monkeypatch: pytest.MonkeyPatch, width: int, unit_offset: bool) -> None:
    assert_as_exact_as_torch(monkeypatch, 507, width, torch.bfloat16, "cuda", unit_offset=unit_offset)
