"""Which tensors Triton's kernels take: on other devices and in other dtypes torch computes.

    if runs_triton(x, weight):
        from .triton.rms_norm import ...    # only here: a machine without such a device needs no Triton
"""

from __future__ import annotations

import torch

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether a kernel can take these tensors: all on a CUDA device, in fp32, bf16 or fp16."""
    return all(t.is_cuda and t.dtype in DTYPES for t in tensors)
