"""Weights in 4 bits: the values of bitsandbytes, idempotent rounding, and LoRA on top."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from lora_oracle import make_layer

from rankup.kernels.lora import Projection, lora_linear, lora_mlp, lora_projections
from rankup.kernels.nf4 import BLOCKSIZE, PIECE, Nf4Weight, _code

SHAPES = [(1, 64), (7, 33), (96, 160), (64, 96), (128, 32), (3, PIECE // 2), (2 * PIECE // 64 + 1, 64)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantising_in_pieces_equals_bitsandbytes_on_the_complete_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = Nf4Weight.quantise(weight)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    # By the definition: bitsandbytes' CPU kernel uses wrong scales if rows do not consist of complete blocks.
    nibbles = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: weight.numel()]
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    assert state.code is not None
    assert torch.equal(ours.dense(), (state.code[nibbles.long()] * scales).to(dtype).view(shape))
    assert (ours.dense().shape, ours.dense().dtype, ours.shape, ours.dtype) == (shape, dtype, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_again_changes_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 96, dtype=dtype) * torch.logspace(-6, 3, 96).to(dtype)
    weight[:7] = 0
    once = Nf4Weight.quantise(weight)
    again = Nf4Weight.quantise(once.dense())
    assert torch.equal(once.dense(), again.dense()) and not torch.equal(once.dense(), weight)
    assert (once.dense()[:7] == 0).all()
    # The coarsest step of NF4 is a third of a block's largest value.
    largest = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
    error = (once.dense() - weight).float().flatten().abs()
    assert (error <= 0.16 * largest.repeat_interleave(64)[: error.numel()]).all()


def test_the_codes_are_those_of_fp32_under_any_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as in vLLM's loader
    try:
        code = _code.__wrapped__(torch.device("cpu"))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(code, get_4bit_type("nf4", device="cpu"))


def test_a_weight_that_is_not_contiguous() -> None:
    weight = torch.randn(64, 48, dtype=torch.bfloat16).t()
    assert torch.equal(Nf4Weight.quantise(weight).dense(), Nf4Weight.quantise(weight.contiguous()).dense())


@pytest.mark.parametrize("shape", SHAPES)
def test_its_size(shape: tuple[int, int]) -> None:
    weight = Nf4Weight.quantise(torch.randn(shape, dtype=torch.bfloat16))
    held = sum(tensor.untyped_storage().nbytes() for tensor in (weight.packed, weight.absmax))
    assert held == math.ceil(weight.shape.numel() / 2) + 4 * math.ceil(weight.shape.numel() / BLOCKSIZE)


# -------------------------------------------------------------------------------------------------------- LoRA on top


def pair(width: int, out: int, *, rank: int | None, bias: bool) -> tuple[Projection, Projection]:
    """A layer in 4 bits, and the same layer with the dequantised weight."""
    layer = make_layer(width, out, rank=rank, bias=bias, dtype=torch.float32)
    assert isinstance(layer.weight, torch.Tensor)
    nf4 = Nf4Weight.quantise(layer.weight)
    return replace(layer, weight=nf4), replace(layer, weight=nf4.dense())


def results(function, x: torch.Tensor, layers: list[Projection]) -> list[torch.Tensor]:
    """The outputs, and every gradient."""
    x = x.clone().requires_grad_(True)
    masters = [m for one in layers if one.adapter is not None for m in (one.adapter.master_a, one.adapter.master_b)]
    for master in masters:
        master.grad = None
    outputs = function(x, layers)
    torch.stack([(y * torch.linspace(-1, 1, y.shape[-1])).sum() for y in outputs]).sum().backward()
    gradients = [x.grad, *(master.grad for master in masters)]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    return [*outputs, *gradients]  # type: ignore[list-item]


FUNCTIONS = {
    "one": (lambda x, layers: [lora_linear(x, layers[0])], [(24, 40)]),
    "three": (lora_projections, [(24, 40), (24, 8), (24, 8)]),
    "mlp": (lambda x, layers: [lora_mlp(x, layers)], [(24, 40), (24, 40), (40, 24)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_on_4_bits_is_bit_exact_with_lora_on_the_dequantised_weight(name: str, rank: int | None, bias: bool) -> None:
    function, sizes = FUNCTIONS[name]
    pairs = [pair(*size, rank=rank, bias=bias) for size in sizes]
    x = torch.randn(5, 3, 24)
    in_4_bits = results(function, x, [nf4 for nf4, _ in pairs])
    dense = results(function, x, [dense for _, dense in pairs])
    assert all(torch.equal(a, b) for a, b in zip(in_4_bits, dense, strict=True))
