"""rankup's side for `profile_step.py`: every torch operation is timed separately, and multiply-adds are counted."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, cast

import torch
from profile_step import BARE_PRODUCT, bucket, is_product
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_sides import RankupSide

PRODUCT_REPEATS = 5


class OperationTimer(TorchDispatchMode):
    """Adds the time of every operation, forward and backward, to its bucket, and the multiply-adds of products.

    Its own overhead is in no bucket.

    Args:
        weights: "base" or "head" by the storage address of each frozen weight.
    """

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self._weights = weights
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        weights = {self._weights[key] for key in map(_address, operands) if key in self._weights}
        operation = func.overloadpacket.__name__
        name = bucket(operation, list(_files()), weights)
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[name] += time.perf_counter() - started
        if is_product(operation):
            self.operations[name] += result.numel() * args[-1].shape[-2]  # the last factor is [..., inner, columns]
        return result


class ProfiledSide(RankupSide):
    """`RankupSide` with a method that profiles its steps."""

    def measure(self, repeats: int) -> tuple[list[float], list[OperationTimer], list[float]]:
        """Plain steps, profiled steps and bare products in turn, so that all see the same changes in machine speed.

        Returns: seconds of the plain steps, the timers of the others, and operations per second of the bare product.
        """
        frozen = [weight for weight in self._policy.model.parameters() if not weight.requires_grad]
        weights = {_address(weight): "base" for weight in frozen if weight.dim() == 2}
        head = cast(torch.nn.Linear, self._policy.model.get_output_embeddings())
        weights[_address(head.weight)] = "head"
        self.step()
        _bare_product_rates()
        plain, rates, timers = [], [], []
        for _ in range(repeats):
            plain.append(self.seconds())
            rates += _bare_product_rates()
            timers.append(OperationTimer(weights))
            with timers[-1]:
                self.step()
        return plain, timers, rates


def _bare_product_rates() -> list[float]:
    """Operations per second (two for each multiply-add) of one large bf16 product, repeated."""
    rows, columns, inner = BARE_PRODUCT
    one, other = (torch.randn(*size, dtype=torch.bfloat16) for size in ((rows, inner), (inner, columns)))
    torch.mm(one, other)
    rates = []
    for _ in range(PRODUCT_REPEATS):
        started = time.perf_counter()
        torch.mm(one, other)
        rates.append(2 * rows * columns * inner / (time.perf_counter() - started))
    return rates


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _files() -> Iterator[str]:
    """Paths of the calling Python frames, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back
