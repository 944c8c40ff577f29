"""Triton kernels, and the functions that launch them. Only modules that run one import them: they import Triton."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, *programs: Any, on: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Run a kernel on the tensor's device (Triton by itself takes the current one); nothing for a grid without programs.

    programs: the numbers of programs, to which Triton gives no common type.
    """
    if all(programs):
        with torch.cuda.device_of(on):
            kernel[programs](**arguments)
