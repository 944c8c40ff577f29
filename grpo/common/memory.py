"""Memory of this process."""

import psutil


def resident_mib() -> float:
    """Resident set size of this process, in MiB."""
    return psutil.Process().memory_info().rss / 2**20
