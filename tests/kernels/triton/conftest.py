"""Kernels run on the CPU in Triton's interpreter, and are compiled for GPUs that are not installed, in different processes.

An environment variable selects the interpreter before Triton is imported, and nothing can be compiled in that process. So tests
marked `interpreted` run in a separate pytest process, which `test_interpreter.py` starts once for all files. For one file:

    TRITON_INTERPRET=1 scripts/test.sh tests/kernels/triton/test_lora.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of the other process."""
    others = [
        item
        for item in items
        if item.path.parent == FOLDER and (item.get_closest_marker("interpreted") is not None) != INTERPRETED
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
