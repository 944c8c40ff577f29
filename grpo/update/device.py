"""The device of a session: which one it is, and how it computes while the session is open.

    with prepared_device(config) as device:     # "cpu" or "cuda"
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...kernels.cpu_memory import keep_freed_memory
from ...kernels.device import check_dtype
from ...kernels.numerics import WORKSPACE, full_precision_sums, make_cublas_repeatable
from ..common.log import logger
from ..config import GRPOConfig
from .optimizer import check_device as check_optimizer


def device_of_torch() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(config: GRPOConfig, device: str) -> None:
    """Whether `cpu` or `cuda` can do what the configuration asks.

    Raises:
        ValueError: the optimizer or `model.dtype` does not run there.
    """
    check_optimizer(config.optim, device)
    check_dtype(config.model.dtype, device)


def check_dtype_here(dtype: str) -> None:
    """Raise ValueError if `model.dtype` does not run on the device of this process."""
    check_dtype(dtype, device_of_torch())


@contextmanager
def prepared_device(config: GRPOConfig) -> Iterator[str]:
    """Settings of the process that a session needs. Those of cuBLAS are restored afterwards.

    Raises:
        ValueError: the environment contradicts `deterministic`.
    """
    device = device_of_torch()
    keep_freed_memory()
    if config.deterministic:
        _make_deterministic(device)
    with full_precision_sums():
        yield device


def _make_deterministic(device: str) -> None:
    if device == "cpu":
        logger.info("deterministic=true changes nothing on CPU, where a seeded run is bit-exact anyway")
    elif not make_cublas_repeatable():
        logger.warning(
            f"deterministic=true: this process had computed on CUDA before {WORKSPACE} was set. If it has multiplied matrices, "
            f"products may differ from run to run: set {WORKSPACE}=:4096:8 before the process starts"
        )
