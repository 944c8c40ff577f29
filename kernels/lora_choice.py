"""What computes a layer's product with its adapter on CUDA: one kernel of Triton, or two products of cuBLAS.

    note = choose("auto", forward_and_backward, products)       # times each for every shape that occurs, and keeps the faster

Fusing saves at most a seventh of the time (`README.md`), and only if Triton multiplies as fast as cuBLAS, which depends on chip
and shape. The two differ by rounding errors. A choice is for the process, until the next one.

Shapes: T tokens, K and N input and output width of the product, R rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["triton", "cublas"]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

TOKENS = 4096
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """K, N and R of a product, whether w is the transpose of a contiguous matrix (as in a forward), and the dtype."""

    depth: int
    columns: int
    rank: int
    is_transposed: bool
    dtype: torch.dtype

    @staticmethod
    def of(w_KN: torch.Tensor, b_RN: torch.Tensor) -> Shape:
        return Shape(w_KN.shape[0], w_KN.shape[1], b_RN.shape[0], w_KN.stride(0) == 1, w_KN.dtype)


_default: Kernel = "triton"
_faster: dict[Shape, Kernel] = {}
_operands: dict[Shape, tuple[torch.Tensor, torch.Tensor]] | None = None
"""w and b of each shape, while `choose` runs the model."""


def kernel_for(w_KN: torch.Tensor, b_RN: torch.Tensor) -> Kernel:
    """The choice for this product; Triton if the last `choose` did not meet its shape."""
    shape = Shape.of(w_KN, b_RN)
    if _operands is not None:
        _operands.setdefault(shape, (w_KN, b_RN))
    return _faster.get(shape, _default)


def choose(
    kernel: Literal["auto", "triton", "cublas"], run: Callable[[], object], products: dict[Kernel, Product]
) -> str | None:
    """Use this kernel from now on, or for `auto` the faster one of each shape that `run` multiplies.

    Args:
        run: a forward and backward pass of the model, on any input.
        products: how to compute `x w + h b` with each.

    Returns:
        One line about what was measured; None if nothing was.
    """
    global _default, _operands
    _faster.clear()
    _default = "triton" if kernel == "auto" else kernel
    if kernel != "auto":
        return None
    _operands = {}
    try:
        run()
        operands = _operands
    finally:
        _operands = None
    totals: dict[Kernel, float] = {"triton": 0.0, "cublas": 0.0}
    for shape, (w_KN, b_RN) in operands.items():
        times = {name: milliseconds(product, w_KN, b_RN) for name, product in products.items()}
        _faster[shape] = "cublas" if times["cublas"] < times["triton"] else "triton"
        totals = {name: totals[name] + times[name] for name in totals}
    return _note(totals) if operands else None


def milliseconds(product: Product, w_KN: torch.Tensor, b_RN: torch.Tensor) -> float:
    """The median time of a product with TOKENS rows, once it has been compiled."""
    x_TK, h_TR = (w_KN.new_zeros(TOKENS, width) for width in (w_KN.shape[0], b_RN.shape[0]))
    x_TK.normal_()
    h_TR.normal_()
    product(x_TK, w_KN, h_TR, b_RN)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        product(x_TK, w_KN, h_TR, b_RN)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _note(totals: dict[Kernel, float]) -> str:
    ours = sum(kernel == "triton" for kernel in _faster.values())
    return (
        f"products with adapters: Triton for {ours} of {len(_faster)} shapes, cuBLAS for the others ({TOKENS} tokens through "
        f"each: Triton {totals['triton']:.2f} ms, cuBLAS {totals['cublas']:.2f} ms; optim.lora_kernel)"
    )
