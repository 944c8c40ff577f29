"""Settings of torch and cuBLAS that decide how exact sums are on CUDA, and whether they are the same in every run.

    with full_precision_sums():             # around engine and trainer
        with deterministic_algorithms():    # around a forward and backward
            ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS's own variable, of which torch takes its size of workspace, too. There is no other way to set it."""

REPEATABLE = (":4096:8", ":16:8")
"""The values with which cuBLAS adds in a fixed order, and which torch's deterministic algorithms accept."""


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """Within it, cuBLAS keeps parts of a sum in fp32: by default it may round them to bf16 or fp16 before it adds them."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names}
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Within it, every operation of torch gives the same result each time, or raises RuntimeError if it cannot.

    Needs `make_cublas_repeatable` on CUDA.
    """
    settings: Any = torch.utils.deterministic  # a module whose attribute is a property
    mode, fills_memory = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills_memory


def make_cublas_repeatable() -> bool:
    """Choose cuBLAS's workspace so that it adds in a fixed order; False if that may be too late, since it may have one.

    CUDA itself may have started: imports of other packages ask for the device's properties.

    Raises:
        ValueError: the environment chooses another workspace.
    """
    chosen = os.environ.get(WORKSPACE)
    if chosen in REPEATABLE:
        return True
    if chosen is not None:
        raise ValueError(f"deterministic=true needs {WORKSPACE} to be {' or '.join(REPEATABLE)} (it is {chosen!r}): unset it")
    os.environ[WORKSPACE] = REPEATABLE[0]
    # cuBLAS reads the variable at its first product, for which torch allocates a workspace and operands.
    return not torch.cuda.is_initialized() or torch.cuda.memory_stats().get("allocation.all.allocated", 0) == 0
