"""Which kernel computes a layer's product with its adapter: chosen for each shape by time, or for all by the user."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lora_oracle import make_layer

from rankup.kernels import lora, lora_choice
from rankup.kernels.lora_choice import Shape, choose, kernel_for


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    lora_choice._faster.clear()
    lora_choice._default = "triton"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Which kernel computed a product, and its K and N, as if on a device with both."""
    calls: list[tuple[str, int, int]] = []

    def of(name: str):
        def product(x, w, h, b, bias=None):
            calls.append((name, *w.shape))
            result = x @ w + h @ b
            return result if bias is None else result + bias

        return product

    monkeypatch.setattr(lora, "_has_kernel", lambda x: True)
    monkeypatch.setattr(lora, "_two_products", of("cublas"))
    monkeypatch.setattr("rankup.kernels.triton.lora.product_with_adapter", of("triton"))
    return calls


def one_pass() -> None:
    """A layer from 7 to 5: its forward multiplies 7 by 5, its backward 5 by 7."""
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    lora.lora_linear(x, make_layer()).sum().backward()


def test_the_faster_one_is_taken_for_each_shape(computed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(product, w: torch.Tensor, b: torch.Tensor) -> float:
        """cuBLAS is the faster one where the input is wider than the output."""
        product(w.new_zeros(1, w.shape[0]), w, w.new_zeros(1, b.shape[0]), b)
        name, depth, columns = computed.pop()
        return 1.0 if (name == "cublas") == (depth > columns) else 3.0

    monkeypatch.setattr(lora_choice, "milliseconds", milliseconds)
    note = lora.choose_kernel("auto", one_pass, like=torch.zeros(1))
    assert note is not None and "Triton for 1 of 2 shapes" in note and "Triton 4.00 ms, cuBLAS 4.00 ms" in note
    computed.clear()
    one_pass()
    assert computed == [("cublas", 7, 5), ("triton", 5, 7)]


@pytest.mark.parametrize("kernel", ["triton", "cublas"])
def test_a_choice_of_the_user_is_for_all_shapes_and_measures_nothing(kernel: lora_choice.Kernel, computed: list) -> None:
    assert lora.choose_kernel(kernel, pytest.fail, like=torch.zeros(1)) is None
    one_pass()
    assert computed == [(kernel, 7, 5), (kernel, 5, 7)]


def test_a_shape_that_was_not_met_is_tritons_and_the_next_choice_forgets() -> None:
    w, b = torch.zeros(3, 4), torch.zeros(2, 4)
    lora_choice._faster[Shape.of(w, b)] = "cublas"
    assert kernel_for(w, b) == "cublas"
    assert kernel_for(w.t(), b) == kernel_for(w.bfloat16(), b) == kernel_for(w, b[:1]) == "triton"
    assert choose("auto", lambda: None, {}) is None
    assert kernel_for(w, b) == "triton"


def test_an_error_while_the_model_runs_ends_the_recording() -> None:
    with pytest.raises(KeyError):
        choose("auto", lambda: {}["missing"], {})
    assert lora_choice._operands is None


def test_without_a_device_nothing_is_chosen() -> None:
    assert lora.choose_kernel("auto", pytest.fail, like=torch.zeros(1)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_are_timed_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_choice, "TOKENS", 64)
    weight, a, b = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in [(48, 32), (8, 32), (48, 8)])
    layer = lora.Projection(weight, None, lora.Adapter(a.float().requires_grad_(), b.float().requires_grad_(), a, b, 1.0))
    x = torch.randn(4, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    note = lora.choose_kernel("auto", lambda: lora.lora_linear(x, layer).sum().backward(), like=weight)
    assert note is not None and "of 2 shapes" in note
