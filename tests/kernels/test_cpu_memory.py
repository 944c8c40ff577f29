"""Freed memory stays in the process and is not paged in again."""

import ctypes
import subprocess
import sys

import pytest

from rankup.kernels.cpu_memory import keep_freed_memory

COUNT_PAGE_FAULTS = """
import resource, torch
from rankup.kernels.cpu_memory import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, kept = page_faults(), keep_freed_memory()
page_faults()
print(before, int(kept), page_faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_freed_memory_is_not_paged_in_again() -> None:
    # In a separate process, because the setting cannot be undone.
    result = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    before, kept, after = map(int, result.stdout.split())
    assert kept
    assert after < before / 5


def test_nothing_is_set_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
