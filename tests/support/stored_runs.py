"""Run folders as a run leaves them, without a run: for the tests of their copies.

    run = StoredRun(Path("runs/mine"))
    run.save(10)                                # one more row of metrics, and a checkpoint with all rows until then
    run.end()                                   # the adapter, and the summary
"""

import json
import shutil
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from rankup.grpo.checkpoint.storage import Storage
from rankup.grpo.checkpoint.store import Checkpoint, CheckpointStore
from rankup.grpo.common.files import atomic_write


class StoredRun:
    """The run in `folder`, with at most two checkpoints. `branch` marks its rows, and `name` its checkpoints (their `run`)."""

    def __init__(self, folder: Path, *, branch: str = "a", name: str | None = None) -> None:
        self.folder, self.branch, self.name = folder, branch, name
        self.store = CheckpointStore(folder / "checkpoints", keep_last=2, keep_best=0)
        (folder / "completions").mkdir(parents=True, exist_ok=True)
        self.metrics = folder / "metrics.jsonl"

    def save(self, step: int) -> Path:
        """Continue to `step` and write its checkpoint, with a copy of the rows until then."""
        atomic_write(self.folder / "config.yaml", b"seed: 1\n")
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "branch": self.branch, "more": "x" * len(self.branch)}) + "\n")
        atomic_write(self.folder / "completions" / f"step_{step:06d}.parquet", f"{step} of {self.branch}".encode())

        def fill(folder: Path) -> None:
            (folder / "adapter").mkdir()
            (folder / "adapter" / "weights").write_bytes(f"{step} {self.branch}".encode() * 500)
            shutil.copy(self.metrics, folder / "rows")

        return self.store.write(step, fill, run=self.name)

    def go_back(self, step: int, *, branch: str) -> None:
        """Resume from the checkpoint of that step, on another branch."""
        self.branch = branch
        self.store.set_aside_after(step)
        shutil.copy(self.store.folder / f"step_{step:06d}" / "rows", self.metrics)
        for path in (self.folder / "completions").iterdir():
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        (self.folder / "summary.json").unlink(missing_ok=True)

    def end(self) -> None:
        """Write the adapter, which always has the same size, and the summary."""
        (self.folder / "adapter").mkdir(exist_ok=True)
        (self.folder / "adapter" / "weights").write_bytes(self.branch[0].encode() * 1000)
        atomic_write(self.folder / "summary.json", json.dumps({"branch": self.branch}).encode())

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; asserts that the records start with those that it was written with."""
        newest = self.store.newest_complete()
        if newest is not None:
            assert self.metrics.read_bytes().startswith((newest.path / "rows").read_bytes())
            assert (self.folder / "completions" / f"{newest.path.name}.parquet").is_file()
        return newest

    def files(self) -> dict[str, bytes]:
        """The content of the files that belong to a copy."""
        files = {path.relative_to(self.folder): path for path in self.folder.rglob("*") if path.is_file()}
        return {
            name.as_posix(): path.read_bytes()
            for name, path in files.items()
            if not any(part.startswith(".") or ".aside." in part for part in name.parts)
        }


def two_checkpoints(folder: Path) -> StoredRun:
    """A run of two checkpoints, with files that do not belong to a copy."""
    run = StoredRun(folder)
    run.save(10)
    run.save(20)
    shutil.copytree(run.store.folder / "step_000010", run.store.folder / "step_000020.aside.1")
    shutil.copytree(run.store.folder / "step_000010", run.store.folder / ".step_000030.partial")
    (run.folder / ".config.tmp.yaml").write_text("interrupted")
    return run


def pulled(url: str, folder: Path) -> StoredRun:
    """The run as another machine gets it."""
    Storage(url, folder).pull()
    return StoredRun(folder)


def copied(url: str) -> dict[str, bytes]:
    """Every file of the copy."""
    fs, root = fsspec.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def forget_memory() -> None:
    """Clear fsspec's memory file system, which is global."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
