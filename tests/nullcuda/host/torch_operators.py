"""What computes on CUDA is replaced when torch is imported: its operators by on_host.cpp, the rest by modules here."""

from __future__ import annotations

import os

import after_import
import attention
import bitsandbytes_operators
import cuda_only
import on_host  # pyright: ignore[reportMissingModuleSource]  # compiled
import torch
import vllm_operators
from dispatch import replace


def install() -> None:
    """Called once per process. Other packages are replaced when they are imported."""
    on_host.install()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    flash = {"_flash_attention_forward": attention.flash_forward, "_flash_attention_backward": attention.flash_backward}
    replace("aten", flash)
    cuda_only.install()
    if os.environ["NULLCUDA_COMPUTE"] != "no-triton":
        after_import.run("triton", _compute_triton)
    bitsandbytes_operators.install()
    vllm_operators.install()


def _compute_triton() -> None:
    import triton_kernels

    triton_kernels.install()
