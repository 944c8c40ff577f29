"""The learner on other cards than the one of this process: they differ in shared memory, registers and code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEARNER = Path(__file__).with_name("test_learner.py")


@pytest.mark.parametrize("card", ["a100", "4090", "5090", "l4"])
def test_the_learner_is_as_exact_on_other_cards(card: str) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(LEARNER)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        command, env=environment | {"NULLCUDA_GPU": card}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "REFUSED" not in result.stderr, result.stderr
