"""Which tensors the Triton kernels support, and what the machine computes in hardware. Torch computes on other devices and in
other dtypes.

    if runs_triton(x, weight):
        from .triton.rms_norm import ...    # imported here: a machine without such a device needs no Triton
    with paths_of_cuda():                   # on fake tensors: choose as on a CUDA device, and launch nothing
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_simulates_cuda = False


def is_on_cuda(x: torch.Tensor) -> bool:
    """Whether x is on a CUDA device, or a fake tensor within `paths_of_cuda`."""
    return x.is_cuda or (_simulates_cuda and isinstance(x, FakeTensor))


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels support these tensors: all are on a CUDA device, in fp32, bf16 or fp16."""
    return all(is_on_cuda(t) and t.dtype in DTYPES for t in tensors)


def is_ampere(x: torch.Tensor) -> bool:
    """Whether x is in bf16 or fp16 on a CUDA device of compute capability 8.0 or later."""
    if not is_on_cuda(x) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


def native_dtype() -> Literal["bfloat16", "float32"]:
    """bf16 where this machine multiplies it in hardware, else fp32: other CPUs emulate bf16, about 50 times slower."""
    is_native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if is_native else "float32"


def multiplies_fp16() -> bool:
    """Whether this machine multiplies fp16 in hardware. Few CPUs do; on others it takes about ten times as long as bf16."""
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def check_dtype(dtype: str, device: str) -> None:
    """Whether a device, `cpu` or `cuda`, has instructions for `model.dtype`.

    Raises:
        ValueError: a GPU before Ampere has none for bf16.
    """
    if device == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise ValueError(
            f"model.dtype=bfloat16: needs a GPU of compute capability 8.0 (Ampere) or later, and {name} has {major}.{minor}: "
            "set model.dtype=float16"
        )


@contextmanager
def paths_of_cuda() -> Iterator[None]:
    """Let fake tensors, and only these, take the code paths of a CUDA device since Ampere. Triton launches no kernel."""
    from triton.runtime.jit import JITFunction

    global _simulates_cuda
    launch = JITFunction.run
    _simulates_cuda, JITFunction.run = True, lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        _simulates_cuda, JITFunction.run = False, launch  # type: ignore[method-assign]
