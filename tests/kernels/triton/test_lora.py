"""LoRA's product by a kernel: against fp64 in Triton's interpreter, compiled for three chips, and on a GPU if there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import SHARED_MEMORY, Build, compile_for, pairwise
from lora_oracle import gradients, make_layer, master_weights, plain, plain_mlp

from rankup.kernels import lora
from rankup.kernels.triton.lora import (
    OTHER_TILE,
    TILES,
    Tile,
    launch_arguments,
    product_with_adapter,
    product_with_adapter_kernel,
)

pytestmark = pytest.mark.slow

interpreted = pytest.mark.interpreted
RAGGED = [(252, 507, 123), (1, 64, 300), (0, 40, 24), (130, 1, 257)]
RANKS = [1, 8, 64, 96, 128]


# --------------------------------------------------------------------------------------------------------- interpreted


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_operands(tokens: int, depth: int, columns: int, rank: int) -> list[torch.Tensor]:
    """x, w, h, b and a bias, in fp64."""
    sizes = [(tokens, depth), (depth, columns), (tokens, rank), (rank, columns), (columns,)]
    return [torch.randn(*size, dtype=torch.float64) for size in sizes]


def product(x: torch.Tensor, w: torch.Tensor, h: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Torch, in the operands' dtype."""
    return torch.addmm(bias, x, w).addmm_(h, b)


def assert_as_exact_as_torch(operands: Sequence[torch.Tensor], dtype: torch.dtype, device: str = "cpu") -> None:
    """Compared with fp64 on the same rounded values, the kernel's error is at most twice torch's."""
    rounded = [operand.to(device, dtype) for operand in operands]
    exact = product(*(operand.double() for operand in rounded))
    ours, theirs = (form(*rounded) for form in (product_with_adapter, product))
    assert ours.dtype == dtype and ours.shape == exact.shape and ours.is_contiguous()
    assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + 1e-12 * exact.norm()


@interpreted
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", RAGGED)
def test_the_kernel_is_as_accurate_as_torch(sizes: tuple[int, int, int], rank: int) -> None:
    assert_as_exact_as_torch(make_operands(*sizes, rank), torch.float32)


@interpreted
@pytest.mark.parametrize("rank", RANKS)
def test_16_bit_operands(rank: int) -> None:
    assert_as_exact_as_torch(make_operands(*RAGGED[0], rank), torch.float16)


@interpreted
def test_more_blocks_than_a_group_has() -> None:
    """Every block is computed by one program: 11 rows of blocks in groups of 8, and 3 columns."""
    assert_as_exact_as_torch(make_operands(1300, 16, 300, 8), torch.float32)


@interpreted
@pytest.mark.parametrize("tile", [*TILES.values(), OTHER_TILE])
def test_only_operands_are_read_and_only_the_output_is_written(tile: Tile) -> None:
    """Views in storage full of NaN, none of them contiguous, for every tile."""
    operands = [operand.float() for operand in make_operands(37, 70, 45, 24)]
    x, w, h, b, bias = operands
    views = [inside_nan(x.t()).t(), inside_nan(w), inside_nan(h), inside_nan(b.t()).t()]
    storage = torch.full((3 * 37, 45), torch.nan)
    out = storage[37:74]
    arguments = launch_arguments(*views, bias, out, tile=tile)  # type: ignore[arg-type]
    product_with_adapter_kernel[(1,)](**arguments)
    torch.testing.assert_close(out, product(*operands))
    assert storage[:37].isnan().all() and storage[74:].isnan().all()


def inside_nan(matrix: torch.Tensor) -> torch.Tensor:
    """The same values as a view: every other column of wider storage, from some row on."""
    rows, columns = matrix.shape
    storage = torch.full((rows + 9, 2 * columns + 9), torch.nan)
    view = storage[4 : rows + 4, 4 : 2 * columns + 4 : 2]
    view.copy_(matrix)
    return view


@interpreted
@pytest.mark.parametrize("is_mlp", [False, True])
def test_the_autograd_functions_with_the_kernel_equal_plain_autograd(is_mlp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of different ranks, the first without an adapter; the gradient of one output is expanded."""
    monkeypatch.setattr(lora, "_has_kernel", lambda x: True)
    ranks = [None, 3, 96]
    sizes = [(70, 33), (70, 33), (33, 50) if is_mlp else (70, 33)]
    layers = [make_layer(*size, rank=rank, dtype=torch.float32) for size, rank in zip(sizes, ranks, strict=True)]
    x = torch.randn(2, 65, 70, requires_grad=True)
    fused = [lora.lora_mlp(x, layers)] if is_mlp else list(lora.lora_projections(x, layers))
    expected = [plain_mlp(x, layers, "silu")] if is_mlp else [plain(x, layer) for layer in layers]
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-3)
    grads = [torch.randn_like(expected[0]), *[torch.randn(33).expand(2, 65, 33)] * 2][: len(expected)]
    inputs = x, *master_weights(layers)
    of_fused, of_expected = gradients(fused, grads, *inputs), gradients(expected, grads, *inputs)
    for ours, theirs in zip(of_fused, of_expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@interpreted
def test_forward_and_backward_of_every_adapted_layer_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []

    def counted(*operands: torch.Tensor) -> torch.Tensor:
        ranks.append(operands[2].shape[1])
        return product_with_adapter(*operands)

    monkeypatch.setattr(lora, "_has_kernel", lambda x: True)
    monkeypatch.setattr("rankup.kernels.triton.lora.product_with_adapter", counted)
    layers = [make_layer(rank=rank, dtype=torch.float32) for rank in (2, None, 3)]
    x = torch.randn(4, 7, requires_grad=True)
    torch.autograd.backward([y.sum() for y in lora.lora_projections(x, layers)])
    assert ranks == [2, 3, 2 + 3]


# ------------------------------------------------------------------------------------------------------------ compiled


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def build(capability: int, rank: int, what: str, tile: Tile) -> Build:
    """A layer of an 8B model; `b` is a view of a slot for rank 128."""
    tokens, width, out = 4096, 4096, 14336
    h, a, b = bf16(tokens, rank), bf16(rank, width), bf16(out, 128)[:, :rank]
    if what == "forward":
        operands = bf16(tokens, width), bf16(out, width).t(), h, b.t(), bf16(out), bf16(tokens, out)
    else:
        operands = bf16(tokens, out), bf16(out, width), h, a, None, bf16(tokens, width)
    return compile_for(capability, product_with_adapter_kernel, **launch_arguments(*operands, tile=tile))


INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DIRECTIONS = ["forward", "backward"]
BUILDS = pairwise([80, 90, 100], [16, 64, 96, 128], DIRECTIONS)


@pytest.mark.parametrize(("capability", "rank", "what"), BUILDS)
def test_every_build_fits_spills_nothing_and_uses_matrix_instructions(capability: int, rank: int, what: str) -> None:
    found = build(capability, rank, what, TILES[capability // 10, 0])
    assert found.fits
    assert (found.stack, found.local) == (0, 0)
    assert found.count(INSTRUCTIONS[capability])
    assert not found.count("atom") and not found.count("red")


@pytest.mark.parametrize("what", DIRECTIONS)
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_the_tile_of_other_chips_fits_the_smallest(capability: int, what: str) -> None:
    found = build(capability, 128, what, OTHER_TILE)
    assert found.shared <= 101_376 == SHARED_MEMORY[capability]
    assert (found.stack, found.local) == (0, 0)
    assert found.count("mma.sync")


@triton.jit
def complete_rank_in_one_step(
    x_ptr,
    w_ptr,
    h_ptr,
    b_ptr,
    out_ptr,
    K,
    N,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same block of the output, but holding the complete rank of h and b next to the blocks of W."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    steps, rank = tl.arange(0, BLOCK_K), tl.arange(0, R)
    h = tl.load(h_ptr + rows * R + rank[None, :])
    b = tl.load(b_ptr + columns * R + rank[:, None])
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + rows * K + k + steps[None, :])
        total = tl.dot(x, tl.load(w_ptr + columns * K + k + steps[:, None]), total)
    tl.store(out_ptr + rows * N + columns, tl.dot(h, b, total).to(tl.bfloat16))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_holding_the_complete_rank_would_not_launch_at_rank_128(capability: int) -> None:
    tile = TILES[capability // 10, 0]
    tokens, width, out, rank = 4096, 4096, 14336, 128
    tensors = {"x_ptr": bf16(tokens, width), "w_ptr": bf16(out, width), "h_ptr": bf16(tokens, rank), "b_ptr": bf16(out, rank)}
    cut = {"BLOCK_T": tile.tokens, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    sizes = {"out_ptr": bf16(tokens, out), "K": width, "N": out, "R": rank, "num_warps": tile.warps, "num_stages": tile.stages}
    in_one_step = compile_for(capability, complete_rank_in_one_step, **tensors, **cut, **sizes)
    in_steps = build(capability, rank, "forward", tile)
    assert in_one_step.shared > SHARED_MEMORY[capability] >= in_steps.shared
    assert not in_one_step.fits and in_steps.fits
    # The rank needs no additional shared memory.
    assert in_steps.shared == build(capability, 16, "forward", tile).shared


# --------------------------------------------------------------------------------------------------- where it is used


def test_without_a_device_torch_computes_and_no_kernel_is_imported() -> None:
    assert not lora._has_kernel(torch.zeros(1, dtype=torch.bfloat16))
    code = "import sys, rankup.kernels.lora; print('rankup.kernels.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", [*RAGGED, pytest.param((4096, 4096, 14336), marks=pytest.mark.large)])
def test_on_a_gpu_it_is_as_accurate_as_torch_and_deterministic(sizes: tuple[int, int, int], rank: int) -> None:
    operands = make_operands(*sizes, rank)
    assert_as_exact_as_torch(operands, torch.bfloat16, "cuda")
    on_device = [operand.to("cuda", torch.bfloat16) for operand in operands]
    assert torch.equal(product_with_adapter(*on_device), product_with_adapter(*on_device))
