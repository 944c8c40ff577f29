"""bitsandbytes' operators on the null device: by its kernels for the CPU, or by its plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import after_import
import torch
from dispatch import computed_on_host, replace


def install() -> None:
    after_import.run("bitsandbytes", _install)


def _install() -> None:
    functions: dict[str, Callable[..., Any]] = {}
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "bitsandbytes" or not _has_kernel(full_name, "CUDA"):
            continue
        if _has_kernel(full_name, "CPU") or _has_kernel(full_name, "CompositeExplicitAutograd"):
            packet, _, overload = name.partition(".")
            functions[name] = computed_on_host(getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default"))
    replace("bitsandbytes", functions)


def _has_kernel(full_name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(full_name, key)
