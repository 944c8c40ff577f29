"""Checkpoints on disk: folders that are whole or not there, and that show it when they are damaged later.

    store = CheckpointStore(Path("runs/mine/checkpoints"), keep_last=2, keep_best=1)
    store.write(10, fill, reward=0.4)               # `fill` writes files into the folder that it is given
    checkpoint = store.newest_whole(say=print)      # skips damaged ones and says why
    checkpoint.path, checkpoint.step, checkpoint.reward

    checkpoints/step_000010/manifest.json           step, reward, and size and SHA-256 of every other file
    checkpoints/.step_000020.partial/               being written, or what a kill left of that

A checkpoint is written beside its place, synced to the disk file by file, and renamed. So under its name stands a whole one
or none, whatever ends the process or the machine; what happens to it afterwards, the checksums show.
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

FORMAT = "rankup-checkpoint-1"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{6,})")
"""Name of a checkpoint's folder, with the steps done."""


class CheckpointError(OSError):
    """A checkpoint could not be written (a full disk, say). Those that were there still are."""


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written; the message says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One whole checkpoint: its folder, the steps done, the reward that it is ranked by (None: not known), and whose it is.

    `run` is the same for all checkpoints of a run, wherever it went on, and for those of no other; None: not known.
    """

    path: Path
    step: int
    reward: float | None
    run: str | None = None


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they stand; made by the first `write`.
        keep_last: how many of the newest are kept, at least 1.
        keep_best: how many of those with the highest reward are kept beside them.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        assert keep_last >= 1
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def write(
        self, step: int, fill: Callable[[Path], None], *, reward: float | None = None, run: str | None = None
    ) -> Path:
        """Make the checkpoint of `step` from the files that `fill` writes, then delete those that need not be kept.

        One of the same step is replaced (a run that was interrupted before an evaluation saves the step again after it).
        Leftovers of writes that were cut off are deleted first: they may be what the disk is full of.

        Raises:
            CheckpointError: it could not be written, with the system's reason. What there was before is whole.
        """
        partial = self.partial(f"step_{step:06d}")
        try:
            self.tidy()
            partial.mkdir(parents=True)
            fill(partial)
            _write_manifest(partial, step=step, reward=reward, run=run)
            path = self.place(partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._mend()
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {self.folder}: {error}") from error
        self._delete_superfluous()
        return path

    def partial(self, name: str) -> Path:
        """The hidden folder in which a checkpoint of that name is made."""
        return self.folder / f".{name}.partial"

    def tidy(self) -> None:
        """Delete what was left by writes that were cut off."""
        self._mend()
        for leftover in self._leftovers():
            shutil.rmtree(leftover, ignore_errors=True)

    def place(self, partial: Path) -> Path:
        """Give a whole checkpoint in its hidden folder its name, and return its path; one that has the name is replaced."""
        path = partial.with_name(partial.name.removesuffix(".partial").removeprefix("."))
        replaced = partial.with_suffix(".replaced")
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        return path

    def newest_whole(self, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest checkpoint that is as it was written, None if there is none; `say` is told why others were skipped.

        Raises:
            ValueError: the newest that can be read has another format; the message names it.
        """
        self._mend()
        for leftover in self._leftovers():
            if leftover.suffix == ".partial":
                say(f"skipped {leftover}: it was not written to its end")
        for path in self._paths():
            try:
                return read_checkpoint(path)
            except DamagedCheckpointError as error:
                say(f"skipped {error}")
        return None

    def own(self, path: Path) -> Path:
        """The same path, once it is seen to be one of this store's.

        Raises:
            ValueError: it is not, or it was set aside.
        """
        self._mend()
        is_ours = path.is_dir() and path.resolve().parent == self.folder.resolve() and NAME.fullmatch(path.name)
        if not is_ours:
            raise ValueError(
                f"{path} is no checkpoint of this run: name a folder such as {self.folder / 'step_000010'} (one that was set "
                "aside gets its name back by hand)"
            )
        return path

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints of later steps, so that the run can go on from `step`; returns their new paths."""
        moved = []
        self._mend()
        for path in self._paths():
            if step_of(path) <= step:
                continue
            number = 1
            while (target := path.with_name(f"{path.name}.aside.{number}")).exists():
                number += 1
            moved.append(path.rename(target))
        return moved

    def _paths(self) -> list[Path]:
        """Checkpoints, whole or not, the newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if NAME.fullmatch(path.name)), key=step_of, reverse=True)

    def _leftovers(self) -> list[Path]:
        return sorted(self.folder.glob(".step_*"))

    def _mend(self) -> None:
        """Give a checkpoint its name back that a kill has caught between the two renames of its replacement."""
        for hidden in self.folder.glob(".step_*.replaced"):
            path = hidden.with_name(hidden.name.removesuffix(".replaced").removeprefix("."))
            if not path.exists():
                hidden.rename(path)

    def _delete_superfluous(self) -> None:
        """Keep the last and the best. A deleted one loses its name first: half deleted it would look damaged."""
        paths = self._paths()
        rewards = {path: reward for path in paths if (reward := _reward_of(path)) is not None}
        best = sorted(rewards, key=lambda path: (rewards[path], step_of(path)), reverse=True)[: self.keep_best]
        for path in set(paths[self.keep_last :]) - set(best):
            try:
                hidden = path.rename(path.with_name(f".{path.name}.deleted"))
            except OSError:  # then it is kept; the new one is whole all the same
                continue
            shutil.rmtree(hidden, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, once all of it is seen to be as it was written.

    Raises:
        DamagedCheckpointError: it is not, with the file that is missing, cut off or changed.
        ValueError: it has another format; the message names it.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing")
        try:
            size, digest = file.stat().st_size, _digest(file)
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if size != expected["bytes"]:
            raise DamagedCheckpointError(f"{path}: {name} has {size} bytes instead of {expected['bytes']}")
        if digest != expected["sha256"]:
            raise DamagedCheckpointError(f"{path}: {name} was changed, its checksum is another one")
    return Checkpoint(path=path, step=manifest["step"], reward=manifest["reward"], run=manifest.get("run"))


def _write_manifest(folder: Path, *, step: int, reward: float | None, run: str | None) -> None:
    """List all files of `folder`, in a file that vouches for itself too, and sync them all."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    manifest = {"format": FORMAT, "rankup": version("rankup"), "step": step, "reward": reward, "run": run, "files": files}
    text = json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync_all(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says: `step`, `reward`, and in `files` the `bytes` and `sha256` of each by its path.

    Raises:
        DamagedCheckpointError: it is missing, or not as it was written.
        ValueError: it has another format; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} is missing") from None
    except (OSError, ValueError):  # no folder or no right to read it; neither JSON nor text
        raise DamagedCheckpointError(f"{path}: {MANIFEST} cannot be read") from None
    if not isinstance(manifest, dict):
        raise DamagedCheckpointError(f"{path}: {MANIFEST} cannot be read")
    found = manifest.get("format")
    if found != FORMAT:
        raise ValueError(
            f"the checkpoint {path} has the format {found!r}, this rankup reads {FORMAT!r}: go on with the rankup that made it "
            f"({manifest.get('rankup', 'not known')}), or start the run anew"
        )
    if manifest.pop("sha256", None) != _digest_of(manifest):
        raise DamagedCheckpointError(f"{path}: {MANIFEST} was changed, its checksum is another one")
    return manifest


def _reward_of(path: Path) -> float | None:
    """What a checkpoint is ranked by, None for a damaged one: it is no best one."""
    try:
        return read_manifest(path)["reward"]
    except ValueError:
        return None


def step_of(path: Path) -> int:
    """The steps that a checkpoint's name says."""
    match = NAME.fullmatch(path.name)
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
    """Wait until a file or a folder's entries are on the disk; some file systems know no such thing for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
