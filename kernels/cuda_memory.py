"""The memory of CUDA tensors: how torch's allocator takes it from the device, and how much was taken.

    use_expandable_segments()           # before the first CUDA tensor
    peak_memory()                       # {"allocated": bytes, "reserved": bytes} since the last call
"""

from __future__ import annotations

import os

import torch

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where a user sets torch's allocator."""


def use_expandable_segments() -> None:
    """Let torch grow its segments of device memory instead of leaving gaps between blocks of other sizes.

    A user's own settings of the allocator are kept. vLLM switches it off for the pools that it gives back, and on again.
    """
    if torch.cuda.is_available() and not any(os.environ.get(name) for name in SETTINGS):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def peak_memory() -> dict[str, int]:
    """Most bytes of the current GPU that torch's tensors took (allocated), and its allocator (reserved), since the last call.
    Empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.reset_peak_memory_stats()
    return peaks
