"""Writing files and folders atomically: under its name stands either the old content or all of the new.

    atomic_write(Path("runs/mine/config.yaml"), b"...")
    with atomic_path(Path("runs/mine/learning_curve.png")) as temporary:
        figure.savefig(temporary)
    with atomic_folder(Path("runs/mine/adapter")) as partial:
        model.save_pretrained(partial)
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of `data`, whatever happens in between."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` with the same suffix, which replaces `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if not temporary.is_dir():
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new hidden folder `.<name>.partial` next to `folder`, which replaces it when the block ends without an error.

    Its files have the permissions of new files: safetensors makes them readable for the owner only.
    """
    partial, replaced = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _with_usual_permissions(partial)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        try:
            partial.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _with_usual_permissions(folder: Path) -> None:
    """Give the files in a folder the permissions that the process's umask leaves a new file."""
    probe = folder / ".new"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != usual:
            try:
                path.chmod(usual)
            except OSError:  # some mounted storage has no permissions
                pass
