"""The fused LoRA layer against plain autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from rankup.kernels.lora import fused_lora_linear


@dataclass
class Layer:
    """A linear layer with its adapter: masters A and B, and the operands a = A, b = scaling * B."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    master_a: torch.Tensor
    master_b: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        return fused_lora_linear(
            x, self.weight, self.bias, self.master_a, self.master_b, self.a, self.b, self.scaling
        )


def make_layer(
    *, width: int = 7, out: int = 5, rank: int = 3, bias: bool = True, scaling: float = 0.7, dtype: torch.dtype = torch.float64
) -> Layer:
    """Random values; masters in fp64 for fp64 operands, else in fp32."""
    master_dtype = torch.promote_types(dtype, torch.float32)
    a, b = torch.randn(rank, width).to(dtype), torch.randn(out, rank).to(dtype)
    return Layer(
        weight=torch.randn(out, width).to(dtype),
        bias=torch.randn(out).to(dtype) if bias else None,
        master_a=a.to(master_dtype).requires_grad_(),
        master_b=(b.to(master_dtype) / scaling).requires_grad_(),
        a=a,
        b=b,
        scaling=scaling,
    )


def plain(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """What PEFT computes, from the masters."""
    return linear(x, layer.weight, layer.bias) + layer.scaling * linear(linear(x, layer.master_a), layer.master_b)


def gradients(y: torch.Tensor, grad: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, grad)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4])
def test_gradcheck(rank: int, bias: bool) -> None:
    layer = make_layer(rank=rank, bias=bias)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        operands = a.detach(), layer.scaling * b.detach()
        return fused_lora_linear(x, layer.weight, layer.bias, a, b, *operands, layer.scaling)

    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, layer.master_a, layer.master_b))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 12),
    bias=st.booleans(),
    scaling=st.sampled_from([0.25, 1.0, 4.0]),
)
def test_any_shape_equals_plain_autograd(
    shape: tuple[int, ...], width: int, out: int, rank: int, bias: bool, scaling: float
) -> None:
    layer = make_layer(width=width, out=out, rank=rank, bias=bias, scaling=scaling)
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*shape, out, dtype=torch.float64)
    inputs = x, layer.master_a, layer.master_b
    fused, expected = layer.fused(x), plain(x, layer)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(gradients(fused, grad, *inputs), gradients(expected, grad, *inputs))


def test_views_of_a_wider_slot() -> None:
    """Rank 3 in a slot of 8: what lies beyond the rank is not read."""
    layer = make_layer(rank=3)
    slot_a, slot_b = torch.full((8, 7), torch.nan, dtype=torch.float64), torch.full((5, 8), torch.nan, dtype=torch.float64)
    slot_a[:3], slot_b[:, :3] = layer.a, layer.b
    x, grad = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    inputs = x, layer.master_a, layer.master_b
    expected = layer.fused(x)
    layer.a, layer.b = slot_a[:3], slot_b[:, :3]
    viewed = layer.fused(x)
    torch.testing.assert_close(viewed, expected)
    torch.testing.assert_close(gradients(viewed, grad, *inputs), gradients(expected, grad, *inputs))


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    layer = make_layer()
    storage = torch.randn(7, 4, 6, dtype=torch.float64, requires_grad=True)
    x = storage.permute(2, 1, 0)[::2]
    grad = torch.randn(5, dtype=torch.float64).expand(3, 4, 5)
    fused, expected = layer.fused(x), plain(x, layer)
    torch.testing.assert_close(fused, expected)
    inputs = storage, layer.master_a, layer.master_b
    torch.testing.assert_close(gradients(fused, grad, *inputs), gradients(expected, grad, *inputs))


def test_the_first_layer_needs_no_gradient_for_its_input() -> None:
    layer = make_layer()
    x = torch.randn(4, 7, dtype=torch.float64)
    layer.fused(x).sum().backward()
    expected = gradients(plain(x, layer).sum(), torch.ones((), dtype=torch.float64), layer.master_a, layer.master_b)
    torch.testing.assert_close((layer.master_a.grad, layer.master_b.grad), expected)


def test_base_weight_and_bias_get_no_gradient() -> None:
    layer = make_layer()
    assert layer.bias is not None
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    layer.fused(torch.randn(4, 7, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None


def test_bf16_operands_give_fp32_gradients_to_masters_whose_values_are_not_read() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    layer.master_a = torch.full((3, 7), torch.nan, requires_grad=True)
    layer.master_b = torch.full((5, 3), torch.nan, requires_grad=True)
    x = torch.randn(4, 7).bfloat16().requires_grad_()
    y = layer.fused(x)
    y.sum().backward()
    results = [y, x.grad, layer.master_a.grad, layer.master_b.grad]
    assert [t.dtype for t in results if t is not None] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(t is not None and t.isfinite().all() for t in results)


def test_nothing_is_kept_for_the_backward_but_the_operands() -> None:
    layer = make_layer()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.fused(x)
    operands = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.a, layer.b)}
    assert {t.untyped_storage().data_ptr() for t in kept} == operands


@pytest.mark.parametrize(("tokens", "width", "out", "rank"), [(252, 96, 160, 8), (123, 160, 96, 64), (1, 64, 64, 96)])
def test_bf16_is_as_exact_as_the_plain_formulation(tokens: int, width: int, out: int, rank: int) -> None:
    """Output and gradients against fp64 on the same bf16 numbers: at most 1.5 times the error of plain bf16 torch."""
    layer = make_layer(width=width, out=out, rank=rank, scaling=0.5, dtype=torch.bfloat16)
    x, grad = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, out).bfloat16()

    def plain_in(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, layer.a, layer.b)]
        assert layer.bias is not None
        x_, a_, b_ = leaves
        y = linear(x_, layer.weight.to(dtype), layer.bias.to(dtype)) + linear(linear(x_, a_), b_)
        grad_x, grad_a, grad_b = gradients(y, grad.to(dtype), *leaves)
        return [y, grad_x, grad_a, layer.scaling * grad_b]

    x_fused = x.clone().requires_grad_()
    y = layer.fused(x_fused)
    fused = [y, *gradients(y, grad, x_fused, layer.master_a, layer.master_b)]
    for ours, theirs, exact in zip(fused, plain_in(torch.bfloat16), plain_in(torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm()
