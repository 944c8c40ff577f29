"""URLs that can hold a copy of a run, and the errors for those that cannot."""

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from stored_runs import StoredRun, two_checkpoints

from rankup.grpo.checkpoint.storage import Storage, StorageError


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return two_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nowhere://bucket/runs/mine", "fsspec has no file system nowhere://; give a folder"),
        ("simplecache::memory://bucket/mine", "fsspec has no file system simplecache::memory://"),
        ("oss://bucket/runs/mine", "Install ossfs to access"),
        ("memory://bucket", "names no folder: give one for the run, such as memory://bucket/runs/mine"),
        ("memory://bucket/", "names no folder"),
        ("memory://bucket/runs/[1]", r"give a path without \* \? and \["),
    ],
)
def test_an_invalid_url_is_refused_before_any_connection(url: str, reason: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"^checkpoint.storage .*{reason}"):
        Storage(url, tmp_path / "run")


@pytest.mark.parametrize("folder", ["run", "run/copy", "."])
def test_a_copy_inside_the_run_folder_or_around_it_is_refused(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must not be inside the run folder run, nor contain it"):
        Storage(folder, Path("run"))


def test_a_relative_folder_is_relative_to_the_current_one(run: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "somewhere [1]").mkdir()
    monkeypatch.chdir(tmp_path / "somewhere [1]")
    storage = Storage("copies/mine", run.folder)
    monkeypatch.chdir(tmp_path)
    storage.push()
    assert storage.url == str(tmp_path / "somewhere [1]" / "copies" / "mine")
    assert (Path(storage.url) / "checkpoints" / "step_000020" / "manifest.json").is_file()


def test_an_unreachable_copy_is_an_error_of_one_line(run: StoredRun, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    url = f"{tmp_path}/file/copy"
    for call in (Storage(url, run.folder).push, Storage(url, run.folder).pull):
        with pytest.raises(StorageError, match=r"^the copy of the run in .*/file/copy could not .*Not a directory") as caught:
            call()
        assert "\n" not in str(caught.value)
    (tmp_path / "copy").write_text("a file")
    with pytest.raises(ValueError, match=r"checkpoint.storage .*/copy is a file"):
        Storage(f"{tmp_path}/copy", run.folder).move_aside()


def test_a_host_that_refuses_the_connection_is_named_once(run: StoredRun):
    class RefusingFileSystem(MemoryFileSystem):
        protocol = "refusing"

        def __init__(self) -> None:
            raise ConnectionError("no route to host")

    fsspec.register_implementation("refusing", RefusingFileSystem, clobber=True)
    url = "refusing://host/runs/mine"
    with pytest.raises(StorageError, match=f"^the copy of the run in {url} could not be opened: no route to host$"):
        Storage(url, run.folder).push()
