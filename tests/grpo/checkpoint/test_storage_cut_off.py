"""Copies of run folders on a line that is cut at every place."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from cut_storage import CutFileSystem
from stored_runs import StoredRun, copied, forget_memory, pulled, quiet, two_checkpoints

from rankup.grpo.checkpoint.storage import Storage, StorageError

fsspec.register_implementation("cut", CutFileSystem, clobber=True)


@pytest.fixture
def cut() -> Iterator[str]:
    CutFileSystem.calls.clear()
    yield "cut://bucket/copy"
    forget_memory()


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return two_checkpoints(tmp_path / "run")


def test_only_what_has_changed_is_written(run: StoredRun, cut: str):
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


def test_the_reason_is_told(run: StoredRun, cut: str):
    with CutFileSystem.failing_after(0), pytest.raises(StorageError, match=f"in {cut} could not be written: the line was cut$"):
        Storage(cut, run.folder).push()


def after_a_step(run: StoredRun) -> None:
    run.go_back(20, branch="a")
    run.save(30)


def after_the_end(run: StoredRun) -> None:
    run.go_back(20, branch="b")
    run.save(30)
    run.end()


def after_another_way(run: StoredRun) -> None:
    run.go_back(10, branch="another")
    run.save(20)


def after_another_way_further(run: StoredRun) -> None:
    run.go_back(10, branch="another")
    run.save(15)
    run.save(25)
    run.save(30)


CHANGES = [after_a_step, after_the_end, after_another_way, after_another_way_further]


def cut_after(num_calls: int, call: Callable[[], object]) -> bool:
    """Whether the call was cut off."""
    with CutFileSystem.failing_after(num_calls):
        try:
            call()
        except StorageError:
            return True
    return False


def is_told_of_half_a_manifest_at_most(said: list[str]) -> bool:
    return all("manifest.json cannot be read" in line for line in said if line.startswith("skipped"))


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("is_same_process", [True, False], ids=["same process", "later one"])
def test_a_push_that_is_cut_anywhere(
    change: Callable[[StoredRun], None], is_same_process: bool, run: StoredRun, cut: str, tmp_path: Path
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
        said: list[str] = []
        other = pulled(cut, tmp_path / f"other{num_cuts}", said.append)
        assert other.newest() is not None and is_told_of_half_a_manifest_at_most(said)
        if (other.folder / "summary.json").exists():  # of an end, with all that belongs to it
            assert any(other.files().items() >= files.items() for files in (before, here.files()))
        storage.push()
        assert copied(cut).items() >= here.files().items()
        num_cuts += 1
    assert num_cuts > 8


def test_a_pull_that_is_cut_anywhere(run: StoredRun, cut: str, tmp_path: Path):
    """The run had ended here, and has gone on elsewhere."""
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
        is_cut = cut_after(num_cuts, lambda here=here: Storage(cut, here.folder).pull(quiet))
        newest = here.newest()
        assert newest is not None and newest.step in (20, 40)
        if (here.folder / "summary.json").exists():
            assert any(here.files().items() >= files.items() for files in (StoredRun(old).files(), run.files()))
        Storage(cut, here.folder).pull(quiet)
        newest = here.newest()
        assert newest is not None and newest.step == 40
        assert here.files().keys() | {"summary.json"} >= run.files().keys()
        num_cuts += 1
    assert num_cuts == len(run.files()) + 1


def test_a_move_that_is_cut_anywhere(run: StoredRun, cut: str, tmp_path: Path):
    num_cuts, is_cut, whole = 0, True, run.files()
    while is_cut:
        forget_memory()
        storage = Storage(cut, run.folder)
        storage.push()
        is_cut = cut_after(num_cuts, lambda storage=storage: storage.move_aside())
        assert copied(cut) == whole or copied(f"{cut}.1") == whole
        said: list[str] = []
        for number, url in enumerate((cut, f"{cut}.1")):
            pulled(url, tmp_path / f"other{num_cuts}.{number}", said.append)
        assert is_told_of_half_a_manifest_at_most(said)
        storage.move_aside()
        assert copied(cut) == {}
        num_cuts += 1
    assert num_cuts == 2 * len(whole) + 1
