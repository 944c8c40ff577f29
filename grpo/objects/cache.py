"""Folders of the user's cache for objects that a run reads from files. A folder's name has a hash of its content.

    digest = Digest()
    digest.add("config", b"...")
    digest.add_tensor("lm_head.weight", weight)
    folder = cached_folder("models", "mine", digest)                # models/mine-0f3a..., the same for the same content
    with new_folder(folder) as partial:                             # None if the folder exists already
        if partial is not None:
            model.save_pretrained(partial)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

from ..common.files import atomic_folder
from ..common.model_files import cache_folder


class Digest:
    """A hash of named pieces; their order counts."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, name: str, data: bytes) -> None:
        """Add a piece."""
        self._hash.update(f"{name} {len(data)}\n".encode())
        self._hash.update(data)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor: its dtype, shape and values."""
        values = tensor.detach().cpu().contiguous()
        self._hash.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        self._hash.update(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # not copied

    def __str__(self) -> str:
        return self._hash.hexdigest()


def cached_folder(kind: str, label: str, digest: Digest) -> Path:
    """The folder for this content. `label`: a name for people, of which only letters, digits, dots and dashes are kept."""
    readable = re.sub(r"[^\w.-]+", "-", label).strip("-.") or kind
    return cache_folder().parent / kind / f"{readable}-{digest}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """A new folder that becomes `folder` when the block ends without an error; None if `folder` exists.

    Other processes that want the same folder wait meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            yield None
            return
        with atomic_folder(folder) as partial:
            yield partial


def size_of(folder: Path) -> str:
    """The size of the files in a folder, in words."""
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:,.1f} MiB"
