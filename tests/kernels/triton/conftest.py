"""Kernels run on the CPU in Triton's interpreter, and are compiled for GPUs that are not installed, in different processes.

An environment variable selects the interpreter before Triton is imported, and nothing can be compiled in that process. So tests
marked `interpreted` run in a separate pytest process, which one test of each file starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture
def run_interpreted(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """A function that runs a file's tests marked `interpreted` in another process, and fails with their output."""

    def run(file: str) -> None:
        settings = ["-c", str(pytestconfig.inipath), "--rootdir", str(pytestconfig.rootpath), "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *settings, file]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        options = {"cwd": pytestconfig.rootpath, "capture_output": True, "text": True, "timeout": 300}
        result = subprocess.run(command, env=environment, **options)
        assert result.returncode == 0, result.stdout + result.stderr

    return run
