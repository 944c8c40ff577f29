"""Which tensors the Triton kernels support. Torch computes on other devices and in other dtypes.

    if runs_triton(x, weight):
        from .triton.rms_norm import ...    # imported here: a machine without such a device needs no Triton
"""

from __future__ import annotations

import torch

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels support these tensors: all are on a CUDA device, in fp32, bf16 or fp16."""
    return all(t.is_cuda and t.dtype in DTYPES for t in tensors)
