"""Times of a function on torch's device: CUDA events around each call, the L2 cache emptied before it; the clock on CPU.

    milliseconds(lambda: a @ b, repeats=20)         # {"median": ..., "min": ..., "max": ..., "all": [...]}
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from common import Result, summarise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UPS = 3
L2_BYTES = 2**28
"""More than the L2 cache of any card."""


def milliseconds(function: Callable[[], object], *, repeats: int) -> Result:
    """`repeats` calls after a few that compile and allocate."""
    for _ in range(WARM_UPS if DEVICE == "cuda" else 1):
        function()
    return summarise(_of_cuda(function, repeats) if DEVICE == "cuda" else _of_cpu(function, repeats))


def _of_cuda(function: Callable[[], object], repeats: int) -> list[float]:
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device=DEVICE)
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _of_cpu(function: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return times
