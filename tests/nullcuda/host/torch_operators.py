"""What computes on CUDA is replaced when torch is imported: its operators by on_host.cpp, the rest by modules here."""

from __future__ import annotations

import os
from collections.abc import Callable

import after_import
import attention
import bitsandbytes_operators
import cuda_only
import on_host  # pyright: ignore[reportMissingModuleSource]  # compiled
import torch
import vllm_operators
from dispatch import computed_on_host, replace


def install() -> None:
    """Called once per process. Other packages are replaced when they are imported."""
    on_host.install()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    flash = {"_flash_attention_forward": attention.flash_forward, "_flash_attention_backward": attention.flash_backward}
    replace("aten", flash)
    softmaxes = {name: computed_on_host(softmax_from_half(name)) for name in ("_softmax", "_log_softmax")}
    replace("aten", softmaxes)
    cuda_only.install()
    if os.environ["NULLCUDA_COMPUTE"] != "no-triton":
        after_import.run("triton", _compute_triton)
    bitsandbytes_operators.install()
    vllm_operators.install()


def softmax_from_half(name: str) -> Callable[[torch.Tensor, int, bool], torch.Tensor]:
    """The operator in fp32 if it converts from 16 bits, for which the CPU has no kernel."""
    operator = getattr(torch.ops.aten, name).default

    def compute(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
        return operator(x.float() if half_to_float else x, dim, False)

    return compute


def _compute_triton() -> None:
    import triton_kernels

    triton_kernels.install()
