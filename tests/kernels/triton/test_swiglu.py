"""SiLU(gate) * up by kernels: against autograd in fp64, inside the fused MLP, and compiled for three chips."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import compile_for
from lora_oracle import gradients, make_layer, master_weights, plain_mlp
from torch.nn.functional import silu

from rankup.kernels import lora
from rankup.kernels.triton.swiglu import (
    BLOCK,
    arguments,
    backward_kernel,
    forward_kernel,
    swiglu,
    swiglu_backward_in_place,
)

interpreted = pytest.mark.interpreted


# ---------------------------------------------------------------------------------------------------------- interpreted


def assert_equals_autograd(gate: torch.Tensor, up: torch.Tensor) -> None:
    d_product, exact = torch.randn(gate.shape), [t.double().requires_grad_() for t in (gate, up)]
    expected = silu(exact[0]) * exact[1]
    expected_gradients = torch.autograd.grad(expected, exact, d_product.double())
    before = gate.clone(), up.clone()
    product = swiglu(gate, up)
    torch.testing.assert_close(product, expected.detach().float())
    product.fill_(float("nan"))  # its memory is used, its content is not read
    swiglu_backward_in_place(d_product, product, gate, up)
    torch.testing.assert_close((d_product, product), tuple(t.float() for t in expected_gradients))
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@interpreted
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 507), (1, BLOCK), (2, BLOCK + 1), (5, 4, 123)])
def test_any_shape_equals_autograd(shape: tuple[int, ...]) -> None:
    assert_equals_autograd(4 * torch.randn(shape), torch.randn(shape))


@interpreted
def test_halves_of_a_stacked_product() -> None:
    gate, up = torch.randn(6, 80).chunk(2, dim=1)
    assert_equals_autograd(gate, up)
    assert_equals_autograd(gate.t(), up.t())


@interpreted
def test_very_negative_and_large_gates_are_finite() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0])
    assert_equals_autograd(gate, torch.ones(6))


@interpreted
def test_fp16_is_as_accurate_as_torch() -> None:
    assert_as_exact_as_torch((64, 100), torch.float16, "cpu")


def assert_as_exact_as_torch(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    gate, up, grad = (torch.randn(shape).to(device, dtype) for _ in range(3))
    exact = [t.double().requires_grad_() for t in (gate, up)]
    expected = [product := silu(exact[0]) * exact[1], *torch.autograd.grad(product, exact, grad.double())]
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    in_torch = [product := silu(leaves[0]) * leaves[1], *torch.autograd.grad(product, leaves, grad)]
    product = swiglu(gate, up)
    d_gate, d_up = grad.clone(), product.clone()
    swiglu_backward_in_place(d_gate, d_up, gate, up)
    for ours, torchs, right in zip([product, d_gate, d_up], in_torch, expected, strict=True):
        assert (ours.double() - right).norm() <= 1.1 * (torchs.double() - right).norm()


@interpreted
@pytest.mark.parametrize(("activation", "launches"), [("silu", 2), ("gelu", 0)])
def test_the_fused_mlp(monkeypatch: pytest.MonkeyPatch, activation: lora.Activation, launches: int) -> None:
    """As on a CUDA device: SiLU by kernels, other activations by torch. A retained graph gives the same gradients again."""
    calls = []
    monkeypatch.setattr(lora, "runs_triton", lambda *_: True)
    monkeypatch.setattr("rankup.kernels.triton.swiglu.swiglu", lambda *gate_up: calls.append(1) or swiglu(*gate_up))
    layers = [make_layer(*sizes, dtype=torch.float32) for sizes in ((7, 12), (7, 12), (12, 5))]
    x, grad = torch.randn(9, 7, requires_grad=True), torch.randn(9, 5)
    inputs = x, *master_weights(layers)
    expected = plain_mlp(x, layers, activation)
    fused = lora.lora_mlp(x, layers, activation)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-3)
    ours = torch.autograd.grad(fused, inputs, grad, retain_graph=True)
    assert len(calls) == launches
    for one, right in zip(ours, gradients(expected, grad, *inputs), strict=True):
        assert (one - right).norm() <= 1e-5 * right.norm()
    assert all(map(torch.equal, ours, torch.autograd.grad(fused, inputs, grad)))


# --------------------------------------------------------------------------------------------------------- ahead of time


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_builds_stay_in_registers(capability: int, dtype: torch.dtype) -> None:
    t = torch.empty(4096, 14_336, dtype=dtype, device="meta")
    for kernel, tensors in (
        (forward_kernel, {"product": t, "gate": t, "up": t}),
        (backward_kernel, {"d_product": t, "product": t, "gate": t, "up": t}),
    ):
        build = compile_for(capability, kernel, **arguments(**tensors))
        assert build.fits and (build.stack, build.local) == (0, 0) and build.registers <= 128
        assert build.count("ld.global.v4") and build.count("st.global.v4"), "16 bytes at a time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(123, 507), pytest.param((4096, 14_336), marks=pytest.mark.large)])
def test_on_a_gpu_it_is_as_accurate_as_torch(shape: tuple[int, int]) -> None:
    assert_as_exact_as_torch(shape, torch.bfloat16, "cuda")
