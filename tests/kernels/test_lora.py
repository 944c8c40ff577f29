"""The fused LoRA functions against plain autograd: one layer, layers that read the same input, a complete MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_oracle import dense, gradients, make_layer, master_weights, plain, plain_mlp

from rankup.kernels.lora import Activation, Adapter, Projection, lora_linear, lora_mlp, lora_projections


def with_masters(layer: Projection, a: torch.Tensor, b: torch.Tensor) -> Projection:
    """The layer with these master weights and the operands that publishing them would give."""
    assert layer.adapter is not None
    scaling = layer.adapter.scaling
    return replace(layer, adapter=Adapter(a, b, a.detach(), scaling * b.detach(), scaling))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4])
def test_gradcheck_of_one_layer(rank: int, bias: bool) -> None:
    layer = make_layer(rank=rank, bias=bias)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, with_masters(layer, a, b))

    assert torch.autograd.gradcheck(function, (x, *master_weights([layer])))


def test_gradcheck_of_layers_with_the_same_input() -> None:
    layers = [make_layer(out=4, rank=2), make_layer(out=2, rank=3, bias=False)]
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return lora_projections(x, [with_masters(layer, a, b) for layer, (a, b) in zip(layers, pairs, strict=True)])

    assert torch.autograd.gradcheck(function, (x, *master_weights(layers)))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_gradcheck_of_the_mlp(activation: Activation) -> None:
    layers = [make_layer(4, 6, rank=2), make_layer(4, 6, rank=1), make_layer(6, 3, rank=2)]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        a, b = parameters[::2], parameters[1::2]
        return lora_mlp(x, [with_masters(*one) for one in zip(layers, a, b, strict=True)], activation)

    assert torch.autograd.gradcheck(function, (x, *master_weights(layers)))


# --------------------------------------------------------------------------------- any shape, against plain autograd

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
RANKS = st.none() | st.integers(1, 12)
LAYER = st.fixed_dictionaries(
    {"out": st.integers(1, 9), "rank": RANKS, "bias": st.booleans(), "scaling": st.sampled_from([0.25, 1.0, 4.0])}
)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, width=st.integers(1, 9), wishes=st.lists(LAYER, min_size=1, max_size=4), data=st.data())
def test_layers_with_the_same_input_equal_plain_autograd(
    shape: tuple[int, ...], width: int, wishes: list[dict], data: st.DataObject
) -> None:
    """Any number of layers, with and without adapters, of different ranks; some outputs may be unused."""
    layers = [make_layer(width, **wish) for wish in wishes]
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    fused, expected = lora_projections(x, layers), [plain(x, layer) for layer in layers]
    torch.testing.assert_close(list(fused), expected)
    used = data.draw(st.lists(st.sampled_from(range(len(layers))), min_size=1, unique=True))
    grads = [torch.randn_like(expected[i]) for i in used]
    inputs = x, *master_weights([layers[i] for i in used])
    torch.testing.assert_close(
        gradients([fused[i] for i in used], grads, *inputs), gradients([expected[i] for i in used], grads, *inputs)
    )


@settings(deadline=None, max_examples=60)
@given(
    shape=SHAPES,
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    ranks=st.tuples(RANKS, RANKS, RANKS),
    bias=st.booleans(),
    activation=st.sampled_from(get_args(Activation)),
)
def test_the_mlp_equals_plain_autograd(
    shape: tuple[int, ...],
    widths: tuple[int, int, int],
    ranks: tuple[int | None, int | None, int | None],
    bias: bool,
    activation: Activation,
) -> None:
    width, middle, out = widths
    sizes = ((width, middle), (width, middle), (middle, out))
    layers = [make_layer(*size, rank=rank, bias=bias) for size, rank in zip(sizes, ranks, strict=True)]
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    fused, expected = lora_mlp(x, layers, activation), plain_mlp(x, layers, activation)
    torch.testing.assert_close(fused, expected)
    grad, inputs = torch.randn_like(expected), (x, *master_weights(layers))
    torch.testing.assert_close(gradients(fused, grad, *inputs), gradients(expected, grad, *inputs))


# ---------------------------------------------------------------------------------------------------- edge cases


def test_views_of_a_wider_slot() -> None:
    """Rank 3 in a slot of 8: values beyond the rank are not read."""
    layer = make_layer(rank=3)
    assert layer.adapter is not None
    slot_a, slot_b = torch.full((8, 7), torch.nan, dtype=torch.float64), torch.full((5, 8), torch.nan, dtype=torch.float64)
    slot_a[:3], slot_b[:, :3] = layer.adapter.a, layer.adapter.b
    viewed_layer = replace(layer, adapter=replace(layer.adapter, a=slot_a[:3], b=slot_b[:, :3]))
    x, grad = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    inputs = x, *master_weights([layer])
    expected, viewed = lora_linear(x, layer), lora_linear(x, viewed_layer)
    torch.testing.assert_close(viewed, expected)
    torch.testing.assert_close(gradients(viewed, grad, *inputs), gradients(expected, grad, *inputs))


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    layers = [make_layer(), make_layer(out=5, rank=2)]
    storage = torch.randn(7, 4, 6, dtype=torch.float64, requires_grad=True)
    x = storage.permute(2, 1, 0)[::2]
    grads = [torch.randn(5, dtype=torch.float64).expand(3, 4, 5)] * 2
    fused, expected = lora_projections(x, layers), [plain(x, layer) for layer in layers]
    torch.testing.assert_close(list(fused), expected)
    inputs = storage, *master_weights(layers)
    torch.testing.assert_close(gradients(fused, grads, *inputs), gradients(expected, grads, *inputs))


@pytest.mark.parametrize("is_mlp", [False, True])
def test_the_first_layer_needs_no_gradient_for_its_input(is_mlp: bool) -> None:
    layers = [make_layer(7, 5), make_layer(7, 5), make_layer(5, 7)]
    x = torch.randn(4, 7, dtype=torch.float64)
    fused = lora_mlp(x, layers, "silu") if is_mlp else lora_projections(x, layers[:2])[0]
    expected = plain_mlp(x, layers, "silu") if is_mlp else plain(x, layers[0])
    inputs = master_weights(layers if is_mlp else layers[:1])
    torch.testing.assert_close(gradients(fused.sum(), None, *inputs), gradients(expected.sum(), None, *inputs))


def test_operands_that_change_before_the_backward_are_an_error() -> None:
    """Publishing between forward and backward would give gradients of neither policy: torch raises."""
    layer = make_layer()
    assert layer.adapter is not None
    y = lora_linear(torch.randn(4, 7, dtype=torch.float64), layer)
    layer.adapter.a.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_mlps_backward_does_not_change_shared_tensors() -> None:
    layers = [make_layer(7, 5), make_layer(7, 5), make_layer(5, 7)]
    x, grad = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, 7, dtype=torch.float64)
    before = x.detach().clone(), grad.clone()
    y = lora_mlp(x, layers, "silu")
    first = torch.autograd.grad(y, [x], grad, retain_graph=True)
    again = torch.autograd.grad(y, [x], grad)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close((x.detach(), grad), before, rtol=0, atol=0)


def test_base_weight_and_bias_get_no_gradient() -> None:
    layer = make_layer()
    assert layer.bias is not None
    dense(layer).requires_grad_()
    layer.bias.requires_grad_()
    lora_linear(torch.randn(4, 7, dtype=torch.float64), layer).sum().backward()
    assert dense(layer).grad is None and layer.bias.grad is None


def test_bf16_operands_give_fp32_gradients_and_master_weights_are_not_read() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.adapter is not None
    master_a, master_b = torch.full((3, 7), torch.nan, requires_grad=True), torch.full((5, 3), torch.nan, requires_grad=True)
    layer = replace(layer, adapter=replace(layer.adapter, master_a=master_a, master_b=master_b))
    x = torch.randn(4, 7).bfloat16().requires_grad_()
    y = lora_linear(x, layer)
    y.sum().backward()
    results = [y, x.grad, master_a.grad, master_b.grad]
    assert [t.dtype for t in results if t is not None] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(t is not None and t.isfinite().all() for t in results)


# ------------------------------------------------------------------------------------------------ memory, precision


def storages(tensors: Sequence[torch.Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def kept_by(function: Callable[[], object]) -> list[torch.Tensor]:
    """The tensors that autograd saves for the backward."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


def parameters(layers: Sequence[Projection]) -> list[torch.Tensor]:
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    frozen = [t for layer in layers for t in (dense(layer), layer.bias) if t is not None]
    return [*frozen, *master_weights(layers), *(t for adapter in adapters for t in (adapter.a, adapter.b))]


def added_by(function: Callable[[], object], known: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """Shapes of tensors that autograd saves for the backward and that did not exist before."""
    pointers = storages(known)
    return sorted(tuple(t.shape) for t in kept_by(function) if t.untyped_storage().data_ptr() not in pointers)


def test_only_h_is_saved_for_the_backward() -> None:
    layers = [make_layer(), make_layer(out=3, rank=2)]
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert added_by(lambda: lora_projections(x, layers), [x, *parameters(layers)]) == [(4, 5)]


def test_the_mlp_saves_only_gate_up_and_h() -> None:
    layers = [make_layer(7, 50), make_layer(7, 50, rank=1), make_layer(50, 7, rank=2)]
    x = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    added = added_by(lambda: lora_mlp(x, layers), [x, *parameters(layers)])
    assert added == [(40, 2), (40, 4), (40, 50), (40, 50)]


def cast(layer: Projection, dtype: torch.dtype) -> Projection:
    """The same bf16 values in another dtype, with B from the published operand."""
    assert layer.adapter is not None and layer.bias is not None
    old = layer.adapter
    a, b = old.a.to(dtype).requires_grad_(), (old.b.to(dtype)).requires_grad_()
    return Projection(dense(layer).to(dtype), layer.bias.to(dtype), Adapter(a, b, a, b, 1.0))


@pytest.mark.parametrize(("tokens", "width", "middle", "rank"), [(252, 96, 160, 8), (123, 160, 96, 64), (1, 64, 64, 96)])
@pytest.mark.parametrize("what", ["linear", "together", "mlp"])
def test_bf16_is_as_accurate_as_the_plain_formulation(what: str, tokens: int, width: int, middle: int, rank: int) -> None:
    """Output and gradients against fp64 on the same bf16 numbers: at most 1.5 times the error of plain bf16 torch."""
    sizes = {"linear": [(width, middle)], "together": [(width, middle), (width, 32), (width, 64)]}
    sizes["mlp"] = [(width, middle), (width, middle), (middle, width)]
    layers = [make_layer(i, o, rank=rank, scaling=1.0, dtype=torch.bfloat16) for i, o in sizes[what]]
    x = torch.randn(tokens, width).bfloat16()
    outs = {"linear": [middle], "together": [middle, 32, 64], "mlp": [width]}[what]
    grads = [torch.randn(tokens, out).bfloat16() for out in outs]

    def plain_in(dtype: torch.dtype) -> list[torch.Tensor]:
        x_, plain_layers = x.to(dtype).requires_grad_(), [cast(layer, dtype) for layer in layers]
        ys = [plain_mlp(x_, plain_layers, "silu")] if what == "mlp" else [plain(x_, layer) for layer in plain_layers]
        return [*ys, *gradients(ys, [g.to(dtype) for g in grads], x_, *master_weights(plain_layers))]

    x_fused = x.clone().requires_grad_()
    ys = [lora_mlp(x_fused, layers, "silu")] if what == "mlp" else list(lora_projections(x_fused, layers))
    fused = [*ys, *gradients(ys, grads, x_fused, *master_weights(layers))]
    for ours, theirs, exact in zip(fused, plain_in(torch.bfloat16), plain_in(torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm() + 1e-12 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_device_sums_over_tokens_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    """All operands are 1: dA and dB count the tokens, and neither 4,099 nor 257 exists in the operands' dtype."""
    tokens = {torch.bfloat16: 257, torch.float16: 4099}[dtype]
    ones = [torch.ones(*shape, dtype=dtype, device="cuda") for shape in [(8, 8), (8, 8), (8, 8)]]
    master_a, master_b = (torch.ones(8, 8, device="cuda", requires_grad=True) for _ in range(2))
    layer = Projection(ones[0], None, Adapter(master_a, master_b, ones[1] / 8, ones[2] / 8, 1.0))
    lora_linear(torch.ones(tokens, 8, dtype=dtype, device="cuda"), layer).sum().backward()
    assert [master.grad.unique().tolist() for master in (master_a, master_b) if master.grad is not None] == [[tokens], [tokens]]
