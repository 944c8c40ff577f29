"""A kernel beside plain torch, both beside fp64: how far it may be off is what torch itself is off.

    case = Case(leaves=[x], constants=[w], ours=fused_linear, plain=lambda x, w: [x @ w.t()])
    finding = compare("linear", case)           # level "ok" or "problem", figures "error", "bound" and "seconds"

The error of a result is the norm of its difference from fp64's, relative to fp64's. A kernel's may be at most `ALLOWANCE` times
that of `plain` in the same dtype, on the same device, or `ROUNDING`, whichever is more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .findings import Finding

ALLOWANCE = 2.0
ROUNDING = torch.finfo(torch.float32).eps  # no kernel computes in more than fp32

Function = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a kernel is tried on.

    leaves: tensors that get gradients. constants: tensors that get none, of any dtype. Numbers must be those of the kernel's
    dtype, so that all sides begin with the same.
    ours, plain: called with leaves and constants, return results; `plain` must do with fp64 too. From those results that
    require a gradient, random ones are followed back to the leaves. A result without dimensions is for that only: in a sum
    errors cancel, by luck.
    """

    leaves: Sequence[torch.Tensor]
    constants: Sequence[torch.Tensor]
    ours: Function
    plain: Function


def compare(name: str, case: Case) -> Finding:
    """The result, or gradient, that comes nearest to its bound, or exceeds it furthest."""
    started = time.perf_counter()
    ours = _results(case.ours, case.leaves, case.constants)
    if ours[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    plain = _results(case.plain, case.leaves, case.constants)
    exact = _results(case.plain, _wide(case.leaves), _wide(case.constants))
    results = [result for result in zip(ours, plain, exact, strict=True) if result[0].dim()]
    errors = [(_error(one, true), max(ALLOWANCE * _error(other, true), ROUNDING)) for one, other, true in results]
    error, bound = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])
    figures = {"error": error, "bound": bound, "seconds": seconds}
    value = f"error {error:.1e} of at most {bound:.1e}"
    if error <= bound:  # it is not where it is not a number
        return Finding(name=name, value=value, level="ok", figures=figures)
    note = "this kernel computes something else here: do not train on this device; please report it with this output"
    return Finding(name=name, value=value, level="problem", note=note, figures=figures)


def _results(function: Function, leaves: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the function returns, and the gradients of the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = list(function(*leaves, *constants))
    generator = torch.Generator().manual_seed(0)
    followed = [result for result in results if result.requires_grad]
    # Whole numbers, which every dtype has.
    directions = [torch.randint(-4, 5, result.shape, generator=generator).to(result) for result in followed]
    return [*results, *(torch.autograd.grad(followed, leaves, directions) if followed else ())]


def _wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()
