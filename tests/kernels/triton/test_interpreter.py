"""All tests of this folder that are marked `interpreted`, in one process: starting one costs more than what most files test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


def test_every_kernel_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    settings = ["-c", str(pytestconfig.inipath), "--rootdir", str(pytestconfig.rootpath), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *settings, "-vv", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = set(re.findall(r"^\S*?(\w+\.py)::\S.* PASSED", result.stdout, re.MULTILINE))
    marked = {path.name for path in FOLDER.glob("test_*.py") if "@interpreted\n" in path.read_text(encoding="utf-8")}
    assert passed == marked and len(marked) >= 5, "every file took part"
