"""The benchmarks of `scripts/gpu_check.sh --no-engine` on the null device: they run, and what needs no clock is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, or one that is not there")

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def measured(tmp_path: Path, script: str, *words: str) -> dict[str, Any]:
    """The results of a benchmark."""
    results = tmp_path / "results.json"
    command = [sys.executable, BENCH / script, "--json", results, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert ended.returncode == 0 and "REFUSED" not in ended.stderr, ended.stdout + ended.stderr
    return json.loads(results.read_text())


def test_the_learner_on_random_weights_peaks_below_the_plan_and_repeats_itself(tmp_path: Path) -> None:
    result = measured(tmp_path, "learner.py", "--shape", "tiny", "--repeats", "1")
    assert result["is_finite"] and result["machine"]["gpu"]["cuda"] == torch.version.cuda
    memory = result["memory"]
    assert 0.5 < memory["peak_allocated"] / memory["plan"]["allocated"] <= 1.0
    assert all(one["identical"] for one in result["equal_updates"].values())


def test_every_kernel_is_timed_beside_torch(tmp_path: Path) -> None:
    result = measured(tmp_path, "kernel_times.py", "--tiny", "--repeats", "1")
    assert [one["direction"] for one in result["products"]] == ["forward", "backward"]
    assert {one["kernel"].partition(",")[0] for one in result["others"]} == {
        *("RMSNorm", "SwiGLU", "rows of logits", "attention", "NF4 (beside bitsandbytes)")
    }
