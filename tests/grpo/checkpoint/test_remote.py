"""Which paths can hold a copy of a run, and what is said of those that cannot."""

from pathlib import Path

import pytest
from stored_runs import StoredRun, quiet, two_checkpoints

from rankup.grpo.checkpoint.storage import Storage, StorageError


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return two_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nowhere://bucket/runs/mine", "no file system goes by nowhere://; give a folder"),
        ("simplecache::memory://bucket/mine", "no file system goes by simplecache::memory://"),
        ("oss://bucket/runs/mine", "pip install ossfs"),
        ("memory://bucket", "names no folder: give one for the run, such as memory://bucket/runs/mine"),
        ("memory://bucket/", "names no folder"),
        ("memory://bucket/runs/[1]", r"give a path without \* \? and \["),
    ],
)
def test_a_url_that_cannot_work_is_refused_at_once(url: str, reason: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"^checkpoint.storage .*{reason}"):
        Storage(url, tmp_path / "run")


@pytest.mark.parametrize("folder", ["run", "run/copy", "."])
def test_a_copy_in_the_run_folder_or_around_it_is_refused(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="lie in one another"):
        Storage(folder, Path("run"))


def test_a_relative_folder_counts_from_the_current_one(run: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "somewhere [1]").mkdir()
    monkeypatch.chdir(tmp_path / "somewhere [1]")
    storage = Storage("copies/mine", run.folder)
    monkeypatch.chdir(tmp_path)
    storage.push()
    assert storage.url == str(tmp_path / "somewhere [1]" / "copies" / "mine")
    assert (Path(storage.url) / "checkpoints" / "step_000020" / "manifest.json").is_file()


def test_a_copy_that_cannot_be_reached_says_so_in_one_line(run: StoredRun, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    url = f"{tmp_path}/file/copy"
    for call in (Storage(url, run.folder).push, lambda: Storage(url, run.folder).pull(quiet)):
        with pytest.raises(StorageError, match=r"^the copy of the run in .*/file/copy could not .*Not a directory") as caught:
            call()
        assert "\n" not in str(caught.value)
    (tmp_path / "copy").write_text("a file")
    with pytest.raises(ValueError, match=r"checkpoint.storage .*/copy is a file"):
        Storage(f"{tmp_path}/copy", run.folder).move_aside()
