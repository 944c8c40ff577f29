"""Copies of run folders over a connection that is lost at every call."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from cut_storage import CutFileSystem
from stored_runs import StoredRun, copied, forget_memory, pulled, two_checkpoints

from rankup.grpo.checkpoint.storage import Storage, StorageError

fsspec.register_implementation("cut", CutFileSystem, clobber=True)


@pytest.fixture
def cut() -> Iterator[str]:
    CutFileSystem.calls.clear()
    yield "cut://bucket/copy"
    forget_memory()


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rankup")


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return two_checkpoints(tmp_path / "run")


def test_only_new_and_changed_files_are_uploaded(run: StoredRun, cut: str):
    run.end()
    storage = Storage(cut, run.folder)
    storage.push()
    CutFileSystem.calls.clear()
    storage.push()
    assert CutFileSystem.calls == []
    run.go_back(20, branch="a")
    run.save(30)
    storage.push()
    calls = [(kind, path.removeprefix("/bucket/copy/")) for kind, path in CutFileSystem.calls]
    records, rest = calls[1:4], calls[4:]
    assert calls[0] == ("remove", "summary.json")
    assert {path for _, path in records} == {"config.yaml", "metrics.jsonl", "completions/step_000030.parquet"}
    assert {path for _, path in rest[:2]} == {f"checkpoints/step_000030/{name}" for name in ("rows", "adapter/weights")}
    assert rest[2:4] == [("put", "checkpoints/step_000030/manifest.json"), ("remove", "checkpoints/step_000010/manifest.json")]
    assert {path for _, path in rest[4:]} == {f"checkpoints/step_000010/{name}" for name in ("rows", "adapter/weights")}
    assert {kind for kind, _ in rest[4:]} == {"remove"}


def test_a_failed_push_names_the_url_and_the_reason(run: StoredRun, cut: str):
    reason = f"in {cut} could not be written: the connection was lost$"
    with CutFileSystem.failing_after(0), pytest.raises(StorageError, match=reason):
        Storage(cut, run.folder).push()


def after_a_step(run: StoredRun) -> None:
    run.go_back(20, branch="a")
    run.save(30)


def after_the_end(run: StoredRun) -> None:
    run.go_back(20, branch="b")
    run.save(30)
    run.end()


def after_resuming_earlier(run: StoredRun) -> None:
    run.go_back(10, branch="another")
    run.save(20)


def after_resuming_earlier_and_more_steps(run: StoredRun) -> None:
    run.go_back(10, branch="another")
    run.save(15)
    run.save(25)
    run.save(30)


CHANGES = [after_a_step, after_the_end, after_resuming_earlier, after_resuming_earlier_and_more_steps]


def cut_after(num_calls: int, call: Callable[[], object]) -> bool:
    """Whether the call was cut off."""
    with CutFileSystem.failing_after(num_calls):
        try:
            call()
        except StorageError:
            return True
    return False


def only_half_written_manifests(messages: list[str]) -> bool:
    """Whether no other damage was logged."""
    return all("manifest.json cannot be read" in line for line in messages if line.startswith("skipped"))


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("is_same_process", [True, False], ids=["same process", "later one"])
def test_a_push_that_is_cut_anywhere(
    change: Callable[[StoredRun], None],
    is_same_process: bool,
    run: StoredRun,
    cut: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    run.end()
    before, num_cuts, is_cut = run.files(), 0, True
    while is_cut:
        forget_memory()
        here = StoredRun(shutil.copytree(run.folder, tmp_path / f"here{num_cuts}"))
        storage = Storage(cut, here.folder)
        storage.push()
        change(here)
        if not is_same_process:
            storage = Storage(cut, here.folder)
        is_cut = cut_after(num_cuts, storage.push)
        caplog.clear()
        other = pulled(cut, tmp_path / f"other{num_cuts}")
        assert only_half_written_manifests(caplog.messages) and other.newest() is not None
        if (other.folder / "summary.json").exists():  # of a finished run, with all files of it
            assert any(other.files().items() >= files.items() for files in (before, here.files()))
        storage.push()
        assert copied(cut).items() >= here.files().items()
        num_cuts += 1
    assert num_cuts > 8


def test_a_pull_that_is_cut_anywhere(run: StoredRun, cut: str, tmp_path: Path):
    """The run was finished locally, and then resumed on another machine."""
    old = tmp_path / "old"
    run.end()
    shutil.copytree(run.folder, old)
    run.go_back(20, branch="a")
    for step in (30, 40):
        run.save(step)
    run.end()
    Storage(cut, run.folder).push()
    num_cuts, is_cut = 0, True
    while is_cut:
        here = StoredRun(shutil.copytree(old, tmp_path / f"here{num_cuts}"))
        is_cut = cut_after(num_cuts, lambda here=here: Storage(cut, here.folder).pull())
        newest = here.newest()
        assert newest is not None and newest.step in (20, 40)
        if (here.folder / "summary.json").exists():
            assert any(here.files().items() >= files.items() for files in (StoredRun(old).files(), run.files()))
        Storage(cut, here.folder).pull()
        newest = here.newest()
        assert newest is not None and newest.step == 40
        assert here.files().keys() | {"summary.json"} >= run.files().keys()
        num_cuts += 1
    assert num_cuts == len(run.files()) + 1


def test_a_move_that_is_cut_anywhere(run: StoredRun, cut: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    num_cuts, is_cut, files = 0, True, run.files()
    while is_cut:
        forget_memory()
        storage = Storage(cut, run.folder)
        storage.push()
        is_cut = cut_after(num_cuts, lambda storage=storage: storage.move_aside())
        assert copied(cut) == files or copied(f"{cut}.1") == files
        caplog.clear()
        for number, url in enumerate((cut, f"{cut}.1")):
            pulled(url, tmp_path / f"other{num_cuts}.{number}")
        assert only_half_written_manifests(caplog.messages)
        storage.move_aside()
        assert copied(cut) == {}
        num_cuts += 1
    assert num_cuts == 2 * len(files) + 1
