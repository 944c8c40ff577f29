"""A run whose folder is copied to a storage resumes from there: real vLLM on a tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from resumed import FaultError, failing_at, left_behind

from rankup.grpo.checkpoint.storage import StorageError
from rankup.rewards.contract import RewardError


def test_a_run_resumes_from_the_storage_alone(train, tmp_path: Path):
    train("undisturbed")
    storage = str(tmp_path / "storage")
    with pytest.raises(RewardError):
        train("run", reward=failing_at(5, FaultError()), storage=storage)
    shutil.rmtree(tmp_path / "run")
    train("run", resume=True, storage=storage)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "storage", tmp_path / "fetched", ignore=shutil.ignore_patterns("checkpoints"))
    assert left_behind(tmp_path / "fetched") == left_behind(tmp_path / "undisturbed")


def test_a_new_run_moves_the_copy_of_the_old_one_aside(train, tmp_path: Path):
    storage = str(tmp_path / "storage")
    train("run", max_steps=2, storage=storage)
    train("run", max_steps=3, storage=storage)
    assert left_behind(tmp_path / "storage.1")["summary"]["steps"] == 2
    assert left_behind(tmp_path / "storage")["summary"]["steps"] == 3


def test_a_finished_run_is_fetched_and_not_repeated(train, tmp_path: Path):
    storage = str(tmp_path / "storage")
    summary = train("run", max_steps=2, storage=storage)
    shutil.rmtree(tmp_path / "run")
    assert train("run", max_steps=2, storage=storage, resume=True) == summary
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_continues_while_its_storage_is_unreachable(train, tmp_path: Path):
    train("undisturbed", save_steps=2)
    storage = tmp_path / "storage"

    def fails(*arguments, **options):
        raise OSError("the network is down")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsspec.implementations.local.LocalFileSystem.put_file", fails)
        train("run", save_steps=2, storage=str(storage))
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "undisturbed")
    train("run", save_steps=2, storage=str(storage), resume=True)


def test_an_unreachable_storage_does_not_start_a_run_from_scratch(train, tmp_path: Path):
    (tmp_path / "storage").write_text("a file")
    with pytest.raises((ValueError, StorageError), match="storage"):
        train("run", storage=str(tmp_path / "storage"), resume=True)
    assert not (tmp_path / "run" / "config.yaml").exists()
