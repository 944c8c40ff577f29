"""The folder of a run: moved aside for a new run, and locked by one process at a time.

    with locked_folder(Path("runs/mine")):
        moved = move_aside(Path("runs/mine"))           # runs/mine.1, if it held a run
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER_DIR = "adapter"
RUN_FILES = (CONFIG_FILE, METRICS_FILE)
"""A folder with one of these holds a run."""


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """The adapter that a run has saved in its folder, which another run may take and move aside.

    Attributes:
        run_dir: where it was saved, without links.
        identity: device, inode and time of its folder, which renaming `run_dir` does not change.
    """

    run_dir: Path
    identity: tuple[int, int, int]

    @property
    def folder(self) -> Path:
        """Where it was saved."""
        return self.run_dir / ADAPTER_DIR

    @staticmethod
    def of(run_dir: Path) -> SavedAdapter | None:
        """The one in the folder of a run; None if there is none."""
        run_dir = run_dir.resolve()
        identity = _written(run_dir / ADAPTER_DIR)
        return None if identity is None else SavedAdapter(run_dir=run_dir, identity=identity)

    def find(self) -> Path:
        """Its folder, also after the run was moved aside.

        Raises:
            ValueError: it is gone, or another run has replaced it.
        """
        for run_dir in (self.run_dir, *sorted(self.run_dir.parent.glob(f"{escape(self.run_dir.name)}.*"))):
            if _written(run_dir / ADAPTER_DIR) == self.identity:
                return run_dir / ADAPTER_DIR
        raise ValueError(
            f"the adapter that this trainer saved in {self.folder} is gone, or another run has replaced it: "
            "train again, or make a new trainer of that run"
        )


_LOCKED: set[tuple[int, int]] = set()
"""Folders that this process has locked, by device and inode, since the system would refuse it a second lock."""


def move_aside(folder: Path, *, option: str = "output_dir") -> Path | None:
    """Rename a folder that holds a run to `<name>.<first free number>` and return that; None if it holds no run.

    Raises:
        ValueError: it is a file, or the process works inside it; the message names `option`, which gave the folder.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{option} {folder} is a file; give a folder")
    if not any(os.path.exists(folder / name) for name in RUN_FILES):
        return None
    if folder.is_symlink():
        folder = folder.resolve()  # the link then points to the new run
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{option} {folder} contains the current folder, so it cannot be moved aside; give another folder"
        )
    number = 1
    while os.path.lexists(f"{folder}.{number}"):
        number += 1
    return folder.rename(f"{folder}.{number}")


@contextmanager
def locked_folder(folder: Path, *, timeout: float = 0.0) -> Iterator[None]:
    """Lock the folder for this process inside the block. The system releases the lock if the process is killed.

    A missing folder is not locked. `timeout`: seconds to wait for the lock.

    Raises:
        ValueError: another process has locked it.
    """
    if not os.path.isdir(folder) or (identity := _identity(folder)) in _LOCKED:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, timeout)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is writing to {folder}: stop it first, or give another output_dir") from None
    except OSError:  # a file system without locks
        pass
    _LOCKED.add(identity)
    try:
        yield
    finally:
        _LOCKED.remove(identity)
        os.close(descriptor)


def _lock(descriptor: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _written(adapter: Path) -> tuple[int, int, int] | None:
    """Device, inode and time of the folder of an adapter; None if it is missing."""
    if not os.path.isdir(adapter):
        return None
    status = adapter.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns
