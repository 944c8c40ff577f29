"""Copies of run folders, in folders and in memory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from cut_storage import RenamingFileSystem
from stored_runs import StoredRun, copied, forget_memory, pulled, two_checkpoints

from rankup.grpo.checkpoint.storage import Storage
from rankup.grpo.checkpoint.store import DamagedCheckpointError, read_checkpoint

fsspec.register_implementation("renaming", RenamingFileSystem, clobber=True)

URLS = {
    "folder": "{}/copy",
    "file": "file://{}/copy",
    "object store": "memory://bucket{}/copy",
    "renaming": "renaming://bucket{}/copy",
}


@pytest.fixture(params=URLS.values(), ids=list(URLS))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield request.param.format(tmp_path)
    forget_memory()


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return two_checkpoints(tmp_path / "run")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rankup")


# --------------------------------------------------------------------------------------------- push and pull


def test_another_machine_gets_the_run(run: StoredRun, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run.end()
    Storage(url, run.folder).push()
    assert copied(url) == run.files()
    other = pulled(url, tmp_path / "other")
    assert other.files() == run.files()
    newest = other.newest()
    assert newest is not None and newest.step == 20
    assert [line.partition(": ")[2] for line in caplog.messages] == ["step_000010, step_000020, records"]
    assert list(other.folder.rglob(".*")) == []


def test_two_machines_resume_by_turns_from_the_copy(run: StoredRun, url: str, tmp_path: Path):
    Storage(url, run.folder).push()
    for step, folder in ((30, tmp_path / "other"), (40, run.folder), (50, tmp_path / "other")):
        storage = Storage(url, folder)
        storage.pull()
        other = StoredRun(folder)
        newest = other.newest()
        assert newest is not None and newest.step == step - 10
        other.save(step)
        other.newest()
        storage.push()
        assert set(copied(url)) >= {f"checkpoints/step_0000{number}/manifest.json" for number in (step - 10, step)}
        assert copied(url).keys() == other.files().keys() | {f"completions/step_0000{step}.parquet"}


def test_a_copy_that_is_behind_changes_nothing(run: StoredRun, url: str, caplog: pytest.LogCaptureFixture):
    Storage(url, run.folder).push()
    run.save(30)
    run.end()
    before = run.files()
    Storage(url, run.folder).pull()
    assert (run.files(), caplog.messages) == (before, [])
    with run.metrics.open("a") as file:
        file.write("further\n")
    Storage(url, run.folder).push()
    before = run.files()
    with run.metrics.open("a") as file:
        file.write("further still\n")
    Storage(url, run.folder).pull()
    assert run.files()["metrics.jsonl"] == before["metrics.jsonl"] + b"further still\n" and caplog.messages == []


def test_an_empty_copy_is_no_error(run: StoredRun, url: str, tmp_path: Path):
    before = run.files()
    Storage(url, run.folder).pull()
    assert run.files() == before
    assert pulled(url, tmp_path / "other").newest() is None
    assert Storage(url, run.folder).move_aside() is None


def test_a_finished_run_without_checkpoints_is_fetched(url: str, tmp_path: Path):
    run = StoredRun(tmp_path / "run")
    run.save(10)
    shutil.rmtree(run.store.folder)
    run.end()
    Storage(url, run.folder).push()
    assert pulled(url, tmp_path / "other").files() == run.files()
    (run.folder / "metrics.jsonl").write_text("a local run")
    Storage(url, run.folder).pull()
    assert run.metrics.read_text() == "a local run"


def test_the_summary_is_removed_when_the_run_resumes(run: StoredRun, url: str, tmp_path: Path):
    storage = Storage(url, run.folder)
    run.end()
    storage.push()
    other = pulled(url, tmp_path / "other")
    run.go_back(20, branch="a")
    run.save(30)
    storage.push()
    assert "summary.json" not in copied(url)
    assert pulled(url, other.folder).files().keys() == run.files().keys() | {"checkpoints/step_000010/manifest.json"} | {
        f"checkpoints/step_000010/{name}" for name in ("rows", "adapter/weights")
    }


def test_a_file_of_the_same_size_is_written_again(run: StoredRun, url: str):
    run.end()
    Storage(url, run.folder).push()
    run.go_back(20, branch="b")
    run.end()
    Storage(url, run.folder).push()
    assert copied(url) == run.files()
    assert copied(url)["adapter/weights"] == b"b" * 1000


# ------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_that_are_deleted_locally_are_deleted_in_the_copy(run: StoredRun, url: str):
    storage = Storage(url, run.folder)
    storage.push()
    run.save(30)
    storage.push()
    assert copied(url) == run.files()
    assert not fsspec.url_to_fs(url)[0].exists(f"{url}/checkpoints/step_000010")
    shutil.rmtree(run.store.folder)
    storage.push()
    assert {name.split("/")[1] for name in copied(url) if name.startswith("checkpoints/")} == {"step_000020", "step_000030"}


def test_a_run_that_resumes_from_an_earlier_checkpoint_removes_the_later_ones(run: StoredRun, url: str, tmp_path: Path):
    Storage(url, run.folder).push()
    run.go_back(10, branch="another")
    run.save(15)
    Storage(url, run.folder).push()
    assert copied(url).keys() == run.files().keys() | {"completions/step_000020.parquet"}
    newest = pulled(url, tmp_path / "other").newest()
    assert newest is not None and newest.step == 15


def test_a_replaced_checkpoint_is_replaced_in_the_copy(run: StoredRun, url: str, tmp_path: Path):
    storage = Storage(url, run.folder)
    storage.push()
    before = copied(url)["checkpoints/step_000020/adapter/weights"]
    run.branch = "b"  # same size, other bytes
    run.save(20)
    storage.push()
    assert copied(url)["checkpoints/step_000020/adapter/weights"] != before
    path = storage.pull_checkpoint("step_000020", tmp_path / "worker")
    assert (path / "adapter" / "weights").read_bytes() == b"20 b" * 500


def damage(url: str, name: str) -> None:
    """Change the middle of a file of the copy."""
    fs, root = fsspec.url_to_fs(url)
    data = bytearray(fs.cat_file(f"{root}/{name}"))
    data[len(data) // 2] ^= 4
    fs.pipe_file(f"{root}/{name}", bytes(data))


def test_a_damaged_checkpoint_is_logged_and_the_older_one_is_fetched(
    run: StoredRun, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    Storage(url, run.folder).push()
    damage(url, "checkpoints/step_000020/adapter/weights")
    other = pulled(url, tmp_path / "other")
    newest = other.newest()
    assert newest is not None and newest.step == 10
    path = f"{Storage(url, other.folder).url}/checkpoints/step_000020"
    assert caplog.messages[0] == f"skipped {path}: adapter/weights was changed: its checksum differs"
    assert sorted(path.name for path in other.store.folder.iterdir()) == ["step_000010"]
    records = other.files()
    damage(url, "metrics.jsonl")
    caplog.clear()
    Storage(url, other.folder).pull()  # the copy has no newer complete checkpoint
    assert other.files() == records and len(caplog.messages) == 1


def test_a_checkpoint_without_a_manifest_is_ignored(run: StoredRun, url: str, tmp_path: Path):
    Storage(url, run.folder).push()
    fs, root = fsspec.url_to_fs(url)
    fs.rm_file(f"{root}/checkpoints/step_000020/manifest.json")
    newest = pulled(url, tmp_path / "other").newest()
    assert newest is not None and newest.step == 10
    with pytest.raises(ValueError, match="has no checkpoint step_000020, but step_000010"):
        Storage(url, run.folder).pull_checkpoint("step_000020", tmp_path / "worker")


def test_local_damage_is_repaired_from_the_copy_and_is_not_uploaded(run: StoredRun, url: str):
    storage, before = Storage(url, run.folder), run.files()
    storage.push()
    os.truncate(run.store.folder / "step_000020" / "adapter" / "weights", 100)
    storage.push()
    assert copied(url) == before
    Storage(url, run.folder).pull()
    assert run.files() == before


def test_a_truncated_checkpoint_is_not_uploaded(run: StoredRun, url: str):
    storage = Storage(url, run.folder)
    storage.push()
    os.truncate(run.save(30) / "adapter" / "weights", 100)
    storage.push()
    assert not [name for name in copied(url) if name.startswith("checkpoints/step_000030")]


def test_a_worker_gets_one_checkpoint(run: StoredRun, url: str, tmp_path: Path):
    Storage(url, run.folder).push()
    storage = Storage(url, tmp_path / "missing")
    path = tmp_path / "worker" / "step_000010"
    for _ in range(2):
        assert storage.pull_checkpoint("step_000010", tmp_path / "worker") == path
        assert read_checkpoint(path).step == 10
    assert os.listdir(tmp_path / "worker") == ["step_000010"] and not (tmp_path / "missing").exists()
    for name in ("step_000030", "10", "../run"):
        with pytest.raises(ValueError, match=f"has no checkpoint {name}, but step_000020, step_000010"):
            storage.pull_checkpoint(name, tmp_path / "worker")
    damage(url, "checkpoints/step_000010/rows")
    with pytest.raises(DamagedCheckpointError, match=r"copy/checkpoints/step_000010: rows was changed"):
        storage.pull_checkpoint("step_000010", tmp_path / "worker")
    assert read_checkpoint(path).step == 10


# ------------------------------------------------------------------------------------------------- moved aside


def test_an_older_copy_is_renamed(run: StoredRun, url: str, tmp_path: Path):
    storage = Storage(url, run.folder)
    for number in (1, 2):
        storage.push()
        moved = storage.move_aside()
        assert moved is not None and moved == f"{storage.url}.{number}"
        assert copied(url) == {}
        newest = pulled(moved, tmp_path / f"other{number}").newest()
        assert newest is not None and newest.step == 20
    storage.push()
    assert copied(url) == run.files()


def test_another_local_run_is_moved_aside(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Even if it has more steps and is finished."""
    today, yesterday = StoredRun(tmp_path / "today", name="today"), StoredRun(tmp_path / "run", branch="b", name="yesterday")
    today.save(10)
    Storage(url, today.folder).push()
    yesterday.save(20)
    yesterday.end()
    Storage(url, tmp_path / "run").pull()
    assert caplog.messages[0] == f"another run that was in {tmp_path / 'run'} is now in {tmp_path / 'run.1'}"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == today.metrics.read_text()
    assert not (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run.1" / "summary.json").exists()


def test_a_finished_run_is_fetched_over_an_unfinished_one(url: str, tmp_path: Path):
    """Both have the same checkpoint, and only the other machine's run is finished."""
    local, other = StoredRun(tmp_path / "local", name="same"), StoredRun(tmp_path / "other", name="same")
    for run in (local, other):
        run.save(10)
    other.end()
    Storage(url, other.folder).push()
    Storage(url, local.folder).pull()
    assert not (local.folder / "summary.json").exists()
    Storage(url, local.folder).pull(always=True)
    assert (local.folder / "summary.json").read_text() == (other.folder / "summary.json").read_text()
    assert (local.folder / "adapter" / "weights").is_file()
