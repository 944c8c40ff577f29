"""Resident memory of this process on Linux, now and at its peak."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def return_freed_memory() -> None:
    """Return freed memory to the kernel, so that resident memory is memory in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Let `resident_bytes("VmHWM")` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> int:
    """`VmRSS`: resident memory now. `VmHWM`: its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")
