"""Tests on a CUDA device that is not there. They are collected on it only: see README.md."""

from __future__ import annotations

import ctypes

import pytest

# The driver is preloaded into the process.
collect_ignore_glob = [] if hasattr(ctypes.CDLL(None), "nullcuda_called") else ["test_*.py"]


@pytest.fixture
def no_other_engine(engine_shelf) -> None:
    """Closes the engine that the tests before shared: vLLM has one memory pool in a process."""
    engine_shelf.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.nullcuda)
