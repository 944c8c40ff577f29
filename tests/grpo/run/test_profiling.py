"""Traces of a block: their content, and that no other file is written."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from rankup.grpo.config import LoggingConfig
from rankup.grpo.run.profiling import profiled, trace_path


def multiply() -> None:
    matrix = torch.ones(64, 64, requires_grad=True)
    (matrix @ matrix).sum().backward()


def test_trace_and_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile" / "step_000005.json.gz"
    for _ in range(2):  # the second trace replaces the first
        with profiled(path):
            multiply()
    assert capfd.readouterr() == ("", "")
    assert sorted(file.name for file in path.parent.iterdir()) == ["step_000005.json.gz", "step_000005.txt"]
    with gzip.open(path) as file:
        operations = [event["name"] for event in json.load(file)["traceEvents"]]
    assert operations.count("aten::mm") == 3  # forward, and backward of both sides
    table = (path.parent / "step_000005.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table


def test_without_a_path_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with profiled(None):
        multiply()
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_raises_leaves_no_files_and_no_profiler_running(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "step_000001.json.gz"
    with pytest.raises(ZeroDivisionError), profiled(path):
        multiply()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with profiled(path):  # fails if another profiler runs
        multiply()
    assert path.is_file()


def test_each_worker_has_a_separate_trace():
    logging = LoggingConfig(output_dir=Path("run"), profile_steps=[5])
    assert trace_path(logging, 4) is None
    assert trace_path(logging, 5) == Path("run/profile/step_000005.json.gz")
    assert trace_path(logging, 5, rank=2) == Path("run/profile/step_000005.worker_2.json.gz")
