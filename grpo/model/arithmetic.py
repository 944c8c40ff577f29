"""How torch computes for a policy.

    arithmetic = Arithmetic(torch.float16, "cpu", deterministic=False)
    with arithmetic.products():     # around forward passes
        ...
    with arithmetic.repeatable():   # around a forward and backward pass
        ...
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ...kernels.fp16_on_cpu import fp16_products
from ...kernels.numerics import deterministic_algorithms


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`dtype`: of the model. `deterministic`: the configuration's option."""

    dtype: torch.dtype
    device: str
    deterministic: bool

    def products(self) -> AbstractContextManager[object]:
        """Products in fp16 are computed in fp32 on CPUs that have no instructions for them."""
        return fp16_products(self.dtype)

    def repeatable(self) -> AbstractContextManager[object]:
        """With `deterministic`, every operation gives the same result each time. On CPU it does anyway."""
        return deterministic_algorithms() if self.deterministic and self.device != "cpu" else nullcontext()
