"""Memory of this process."""

import resource
from pathlib import Path


def resident_mib() -> float:
    """Resident set size of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
