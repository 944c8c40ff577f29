"""The folder of a run: moved aside for a new run, locked by one process at a time.

    with locked_folder(Path("runs/mine")):
        moved = move_aside(Path("runs/mine"))           # runs/mine.1, if it held a run
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
RUN_FILES = (CONFIG_FILE, METRICS_FILE)
"""A folder with one of these holds a run."""

_OWNED: set[tuple[int, int]] = set()
"""Folders that this process owns, by device and inode: the system would lock it out of its own."""


def move_aside(folder: Path, *, option: str = "output_dir") -> Path | None:
    """Renames a folder that holds a run to `<name>.<first free number>`; None where there is no run in it.

    Raises ValueError, which names the option that gave the folder, where it is a file or the process works inside it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file; give a folder")
    if not any((folder / name).exists() for name in RUN_FILES):
        return None
    if folder.is_symlink():
        folder = folder.resolve()  # the link goes on pointing to where the new run is written
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{option} {folder} holds the current folder, so it cannot be moved aside; name a folder of its own"
        )
    number = 1
    while os.path.lexists(f"{folder}.{number}"):
        number += 1
    return folder.rename(f"{folder}.{number}")


@contextmanager
def locked_folder(folder: Path, *, timeout: float = 0.0) -> Iterator[None]:
    """Own the folder for this process inside the block, or until it ends in whatever way. One that is not there has no owner.

    `timeout`: seconds to wait for another owner's end.

    Raises ValueError where another process owns it.
    """
    if not folder.is_dir() or (identity := _identity(folder)) in _OWNED:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, timeout)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is writing to {folder}: end it first, or give another output_dir") from None
    except OSError:  # a file system without locks: there is nothing to see whether anybody else writes
        pass
    _OWNED.add(identity)
    try:
        yield
    finally:
        _OWNED.remove(identity)
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
