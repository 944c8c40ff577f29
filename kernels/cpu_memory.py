"""Keep memory that torch frees on CPU in the process, until a run is over.

glibc returns freed blocks above 128 KiB to the kernel immediately, so every large temporary is paged in and zeroed again: a
quarter of a training step on two cores. `keep_freed_memory()` raises the two thresholds for this process, and
`return_freed_memory()` returns what is free.
"""

from __future__ import annotations

import ctypes
import gc
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let malloc reuse blocks of up to 1 GiB instead of unmapping them. Returns whether it worked (glibc on Linux only)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, for example musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> bool:
    """Return freed memory to the kernel. Returns whether there was any (glibc on Linux only).

    Collects garbage first: models are full of cycles.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    return trim is not None and bool(trim(0))
