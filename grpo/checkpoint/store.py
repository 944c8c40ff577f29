"""Checkpoints on disk: atomic, checksummed folders.

    store = CheckpointStore(Path("runs/mine/checkpoints"), keep_last=2, keep_best=1)
    store.write(10, fill, reward=0.4)               # `fill` writes files into the folder that it gets
    checkpoint = store.newest_complete()            # skips damaged ones and logs why
    checkpoint.path, checkpoint.step, checkpoint.reward

    checkpoints/step_000010/manifest.json           step, reward, and size and SHA-256 of every other file
    checkpoints/.step_000020.partial/               being written, or left by a killed process

A checkpoint is written to a hidden folder, synced to the disk and renamed. So a checkpoint is complete or absent, however the
process or the machine ends. The checksums show damage that happens later.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..common.files import atomic_folder
from ..common.log import logger

FORMAT = "rankup-checkpoint-2"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{6,})")
"""Name of a checkpoint's folder, with the steps done."""


class CheckpointError(OSError):
    """A checkpoint could not be written (for example, the disk is full). Earlier checkpoints are unchanged."""


class DamagedCheckpointError(ValueError):
    """The files of a checkpoint are not those that were written; the message names the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One complete checkpoint: its folder, the steps done, the reward that it is ranked by (None: not known), and its run.

    `run` identifies the run: all its checkpoints have the same value, on every machine. None: not known.
    """

    path: Path
    step: int
    reward: float | None
    run: str | None = None


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: their parent; made by the first `write`.
        keep_last: how many of the newest to keep, at least 1.
        keep_best: how many of those with the highest reward to keep in addition.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        assert keep_last >= 1
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def write(self, step: int, fill: Callable[[Path], None], *, reward: float | None = None, run: str | None = None) -> Path:
        """Write the checkpoint of `step` from the files that `fill` writes, then delete those that are not to be kept.

        One of the same step is replaced (a run that was interrupted before an evaluation saves the step again after it).
        Leftovers of interrupted writes are deleted first, since they may fill the disk.

        Raises:
            CheckpointError: it could not be written, with the system's reason. Earlier checkpoints are unchanged.
        """
        path = self.folder / f"step_{step:06d}"
        try:
            self.tidy()
            with atomic_folder(path) as partial:
                fill(partial)
                _write_manifest(partial, step=step, reward=reward, run=run)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {self.folder}: {error}") from error
        self._apply_retention()
        return path

    def tidy(self) -> None:
        """Delete what interrupted writes left."""
        self._recover_interrupted_rename()
        for leftover in list(self.folder.glob(".step_*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def newest_complete(self, *, log_skipped: bool = True) -> Checkpoint | None:
        """The newest checkpoint that is complete and undamaged, None if there is none. Logs why others were skipped.

        Raises:
            ValueError: the newest that can be read has another format; the message names it.
        """
        self._recover_interrupted_rename()
        log = logger.info if log_skipped else logger.debug
        for leftover in sorted(self.folder.glob(".step_*.partial")):
            log("skipped %s: the write was interrupted", leftover)
        for path in self._paths():
            try:
                return read_checkpoint(path)
            except DamagedCheckpointError as error:
                log("skipped %s", error)
        return None

    def validate_belongs(self, path: Path) -> Path:
        """The same path, if it is a checkpoint of this store.

        Raises:
            ValueError: it is not, or it was set aside.
        """
        self._recover_interrupted_rename()
        if not (path.is_dir() and path.resolve().parent == self.folder.resolve() and NAME.fullmatch(path.name)):
            raise ValueError(
                f"{path} is not a checkpoint of this run: give a folder such as {self.folder / 'step_000010'} (to use one that "
                "was set aside, rename it first)"
            )
        return path

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints of later steps, so that the run can resume from `step`; returns their new paths."""
        moved = []
        self._recover_interrupted_rename()
        for path in self._paths():
            if step_of(path.name) <= step:
                continue
            number = 1
            while (target := path.with_name(f"{path.name}.aside.{number}")).exists():
                number += 1
            moved.append(path.rename(target))
        return moved

    def _paths(self) -> list[Path]:
        """Checkpoints, damaged or not, the newest first."""
        return checkpoint_folders(self.folder)

    def _recover_interrupted_rename(self) -> None:
        """Restore the name of a checkpoint if the process was killed between the two renames of `atomic_folder`."""
        for hidden in self.folder.glob(".step_*.replaced"):
            path = hidden.with_name(hidden.name.removesuffix(".replaced").removeprefix("."))
            if not path.exists():
                hidden.rename(path)

    def _apply_retention(self) -> None:
        """Keep the last and the best. Others are renamed before they are deleted, so that none looks damaged."""
        paths = self._paths()
        rewards = {path: reward for path in paths if (reward := _reward_of(path)) is not None}
        best = sorted(rewards, key=lambda path: (rewards[path], step_of(path.name)), reverse=True)[: self.keep_best]
        for path in set(paths[self.keep_last :]) - set(best):
            try:
                hidden = path.rename(path.with_name(f".{path.name}.deleted"))
            except OSError:  # it is kept; the new one is complete nevertheless
                continue
            shutil.rmtree(hidden, ignore_errors=True)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints, damaged or not, the newest first."""
    paths = (path for path in folder.glob("step_*") if NAME.fullmatch(path.name))
    return sorted(paths, key=lambda path: step_of(path.name), reverse=True)


def read_checkpoint(path: Path, *, checksums: bool = True, under: str = "") -> Checkpoint:
    """The checkpoint in a folder, after its files were verified: by their checksums, or else only by their sizes.

    Args:
        under: only files whose paths begin like this, such as `adapter/`.

    Raises:
        DamagedCheckpointError: a file is missing, truncated or changed; the message names it.
        ValueError: it has another format; the message names it.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        if not name.startswith(under):
            continue
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing")
        try:
            size, digest = file.stat().st_size, _digest(file) if checksums else expected["sha256"]
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if size != expected["bytes"]:
            raise DamagedCheckpointError(f"{path}: {name} has {size} bytes instead of {expected['bytes']}")
        if digest != expected["sha256"]:
            raise DamagedCheckpointError(f"{path}: {name} was changed: its checksum differs")
    return Checkpoint(path=path, step=manifest["step"], reward=manifest["reward"], run=manifest.get("run"))


def _write_manifest(folder: Path, *, step: int, reward: float | None, run: str | None) -> None:
    """List all files of `folder` with their checksums (and its own), and sync them all."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    manifest = {"format": FORMAT, "rankup": version("rankup"), "step": step, "reward": reward, "run": run, "files": files}
    text = json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync_all(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: `step`, `reward`, `run`, and in `files` the `bytes` and `sha256` of each file by its path.

    Raises:
        DamagedCheckpointError: it is missing or changed.
        ValueError: it has another format; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} is missing") from None
    except (OSError, ValueError):  # no folder, no permission, no JSON
        manifest = None
    if not isinstance(manifest, dict):
        raise DamagedCheckpointError(f"{path}: {MANIFEST} cannot be read")
    found = manifest.get("format")
    if found != FORMAT:
        raise ValueError(
            f"the checkpoint {path} has the format {found!r}, this rankup reads {FORMAT!r}: resume with the rankup that wrote "
            f"it ({manifest.get('rankup', 'not known')}), or start the run from scratch"
        )
    if manifest.pop("sha256", None) != _digest_of(manifest):
        raise DamagedCheckpointError(f"{path}: {MANIFEST} was changed: its checksum differs")
    return manifest


def _reward_of(path: Path) -> float | None:
    """The value that ranks a checkpoint; None for a damaged one, so that it is never the best."""
    try:
        return read_manifest(path)["reward"]
    except ValueError:
        return None


def step_of(name: str) -> int:
    """The number of steps in the name of a checkpoint's folder."""
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync_all(folder: Path) -> None:
    """`sync` for a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk. Some file systems cannot sync folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
