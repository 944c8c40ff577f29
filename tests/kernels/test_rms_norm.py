"""RMSNorm with a frozen weight: bit-exact with transformers' forward, and with the gradient of plain autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rankup.kernels.rms_norm import rms_norm

EPS = 1e-5


def plain(x: torch.Tensor, weight: torch.Tensor, *, unit_offset: bool) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (weight + 1 if unit_offset else weight)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradcheck(unit_offset: bool) -> None:
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS, unit_offset=unit_offset), (x,))


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 4), max_size=3).map(tuple), width=st.integers(1, 9), unit_offset=st.booleans())
def test_any_shape_equals_plain_autograd(shape: tuple[int, ...], width: int, unit_offset: bool) -> None:
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    weight, grad = torch.randn(width, dtype=torch.float64), torch.randn(*shape, width, dtype=torch.float64)
    y, expected = rms_norm(x, weight, EPS, unit_offset=unit_offset), plain(x, weight, unit_offset=unit_offset)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_forward_is_bit_exact_with_transformers(dtype: torch.dtype, unit_offset: bool) -> None:
    theirs = (Gemma3RMSNorm if unit_offset else LlamaRMSNorm)(48, eps=EPS)
    torch.nn.init.normal_(theirs.weight)
    theirs.to(dtype)
    x = (3 * torch.randn(7, 5, 48)).to(dtype).transpose(0, 1)
    assert torch.equal(rms_norm(x, theirs.weight.detach(), EPS, unit_offset=unit_offset), theirs(x))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_bf16_gradient_is_as_accurate_as_that_of_autograd(unit_offset: bool) -> None:
    theirs = (Gemma3RMSNorm if unit_offset else LlamaRMSNorm)(96, eps=EPS).requires_grad_(False)
    torch.nn.init.normal_(theirs.weight)
    theirs.bfloat16()
    x, grad = (2 * torch.randn(252, 96)).bfloat16().requires_grad_(), torch.randn(252, 96).bfloat16()
    (ours,) = torch.autograd.grad(rms_norm(x, theirs.weight, EPS, unit_offset=unit_offset), x, grad)
    (plain_bf16,) = torch.autograd.grad(theirs(x), x, grad)
    x64 = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(x64, theirs.weight.double(), unit_offset=unit_offset), x64, grad.double())
    assert (ours.double() - exact).norm() <= 1.5 * (plain_bf16.double() - exact).norm()


def test_little_is_saved_for_the_backward() -> None:
    x, weight = torch.randn(10, 64).bfloat16().requires_grad_(), torch.randn(64).bfloat16()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    known = {t.untyped_storage().data_ptr() for t in (x, weight)}
    assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in known] == [(10, 1)]
