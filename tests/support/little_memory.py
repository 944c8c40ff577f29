"""A device whose memory runs out in large packs: an operation of the pass raises what torch raises on CUDA.

    with little_memory(40):             # in the backward pass of a projection of more than 40 tokens
        learner.update(groups, step=0)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch

from rankup.kernels import lora

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"


@contextmanager
def little_memory(
    tokens: int, *, fails_in: Literal["forward", "backward"] = "backward", error: type[BaseException] = torch.OutOfMemoryError
) -> Iterator[list[int]]:
    """Adapted projections of packs with more tokens fail; yields the sizes that did.

    In the backward pass it is every second of these calls, so that layers that come earlier in the pass have left gradients.
    """
    original, failures, calls = getattr(lora._Projections, fails_in), list[int](), list[int]()

    def limited(ctx: Any, *tensors: Any) -> Any:
        rows = next(tensor for tensor in tensors if isinstance(tensor, torch.Tensor)).flatten(0, -2).shape[0]
        if rows > tokens:
            calls.append(rows)
            if fails_in == "forward" or len(calls) % 2 == 0:
                failures.append(rows)
                raise error(MESSAGE)
        return original(ctx, *tensors)

    with patch.object(lora._Projections, fails_in, staticmethod(limited)):
        yield failures
