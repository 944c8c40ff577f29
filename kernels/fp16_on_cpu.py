"""Products in fp16 on CPUs that have no instructions for them, which most have not.

    with fp16_products(torch.float16):
        y = x @ w           # of 128 rows or more, 4 times as fast as torch's own product

Operands are converted to fp32, and the result is rounded once, as on a GPU. Torch's own product in fp16 takes about ten times
as long as in bf16 there. Within the block all products are changed, those of vLLM's layers and of backward passes too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .device import multiplies_fp16

aten = torch.ops.aten

PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.mm.default: torch.mm,
    aten.mm.out: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.bmm.out: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.addmm.out: torch.addmm,
    aten.addmm_.default: torch.addmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.baddbmm.out: torch.baddbmm,
    aten.baddbmm_.default: torch.baddbmm,
    aten.matmul.default: torch.matmul,
    aten.linear.default: torch.nn.functional.linear,
}
IN_PLACE = {aten.addmm_.default, aten.baddbmm_.default}


def fp16_products(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Within it, products in fp16 are computed in fp32. Changes nothing if `dtype`, that of a model, is another, or if this
    machine multiplies fp16."""
    return nullcontext() if dtype != torch.float16 or multiplies_fp16() else _InFp32()


class _InFp32(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, product = kwargs or {}, PRODUCTS.get(func)
        if product is None or not all(t.dtype == torch.float16 for t in args if isinstance(t, torch.Tensor)):
            return func(*args, **kwargs)
        out = args[0] if func in IN_PLACE else kwargs.pop("out", None)
        result = product(*(t.float() if isinstance(t, torch.Tensor) else t for t in args), **kwargs)
        return result.half() if out is None else out.copy_(result)
