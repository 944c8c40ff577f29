"""Files at any path of fsspec's: a folder, a mounted disk, an object store.

    files = RemoteFiles("s3://bucket/runs/mine")
    files.write(Path("runs/mine/metrics.jsonl"), "metrics.jsonl")
    files.sizes()                                   # {"metrics.jsonl": 1234}
    files.fetch("metrics.jsonl", Path("here/metrics.jsonl"))
    files.remove(["metrics.jsonl"])

Folders and object stores replace a file as a whole; others of fsspec's (sftp, smb) can leave one cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from .store import sync


class StorageError(OSError):
    """The copy could not be reached, read or written; the message names it and the reason, in one line."""


class RemoteFiles:
    """The files under `url`, by their paths in it. Nothing is asked of the other side before the first call of a method.

    Whatever fails there is raised as StorageError.

    Attributes:
        url: the path without a slash at its end; of a local folder the absolute path, whatever folder is the current one later.
        is_local: whether it is a folder that this machine sees.

    Raises:
        ValueError: no such kind of file system, its package is not installed, or the path names no folder.
    """

    def __init__(self, url: str) -> None:
        self.is_local = issubclass(_file_system_class(url), LocalFileSystem)
        self.url = url_to_fs(url)[1] if self.is_local else url.rstrip("/")
        if self.is_local:
            return
        if not urlsplit(url).path.strip("/"):
            raise ValueError(f"checkpoint.storage {url} names no folder: give one for the run, such as {self.url}/runs/mine")
        if set(url) & set("*?["):  # fsspec takes them for patterns
            raise ValueError(f"checkpoint.storage {url}: give a path without * ? and [")

    def sizes(self, suffix: str = "") -> dict[str, int]:
        """The size in bytes of every file, or of those under the path that has `suffix` added to its end.

        By `ls`, folder by folder: fsspec's `find` takes some errors for an empty folder.
        """
        fs, root = self._root
        root += suffix
        folders, sizes = [root], {}
        with self._told("read"):
            fs.invalidate_cache()
            while folders:
                folder = folders.pop()
                for name, entry in _entries(fs, folder):
                    if entry["type"] == "directory":
                        folders.append(name)
                    else:
                        sizes[name.removeprefix(f"{root}/")] = entry["size"]
        return sizes

    def read(self, name: str) -> bytes:
        """All of a small file."""
        fs, root = self._root
        with self._told("read"):
            data = fs.cat_file(f"{root}/{name}")
        assert isinstance(data, bytes)
        return data

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to `target`, which is on the disk then; what is cut off leaves it as it was. Makes its folder."""
        fs, root = self._root
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as temporary, self._told("read"):
            fs.get_file(f"{root}/{name}", str(temporary))

    def write(self, source: Path, name: str) -> None:
        """Copy a local file there, or replace the one that is.

        Raises:
            FileNotFoundError: there is no `source`.
        """
        fs, root = self._root
        target = f"{root}/{name}"
        with self._told("written"):
            self._make_folders([target])
        source.stat()
        if self.is_local:
            with self._told("written"), _replacing(Path(target)) as temporary:
                fs.put_file(str(source), str(temporary))
            return
        with self._told("written"):
            fs.put_file(str(source), target)

    def copy(self, names: list[str], suffix: str) -> None:
        """Copy files to the path that has `suffix` added to its end."""
        fs, root = self._root
        targets = [f"{root}{suffix}/{name}" for name in names]
        with self._told("copied"):
            self._make_folders(targets)
            fs.copy([f"{root}/{name}" for name in names], targets, on_error="raise")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in this order."""
        fs, root = self._root
        with self._told("written"):
            for name in names:  # one by one: the call for many takes names for patterns
                fs.rm_file(f"{root}/{name}")

    def remove_folder(self, name: str) -> None:
        """Remove what is left of a folder whose files are removed: object stores have no folders."""
        fs, root = self._root
        if not fs.async_impl:
            with self._told("written"), suppress(FileNotFoundError):
                fs.rm(f"{root}/{name}", recursive=True)

    @cached_property
    def _root(self) -> tuple[AbstractFileSystem, str]:
        with self._told("opened"):
            return url_to_fs(self.url)

    def _make_folders(self, paths: Iterable[str]) -> None:
        """The folders of these files. Object stores have none: asked for one, they look for the bucket, or even make it."""
        fs = self._root[0]
        if not fs.async_impl:  # fsspec's object stores are the asynchronous ones
            for folder in sorted({path.rpartition("/")[0] for path in paths}):
                fs.makedirs(folder, exist_ok=True)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system raises errors of its own: botocore's, aiohttp's, google's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StorageError(f"the copy of the run in {self.url} could not be {what}: {reason}") from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A hidden file to write, which takes the place of `target` once the block has ended well."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _entries(fs: AbstractFileSystem, folder: str) -> Iterator[tuple[str, dict]]:
    """What a folder holds; nothing where there is none."""
    try:
        entries = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return
    for entry in entries:
        name = entry["name"].rstrip("/")
        if name.startswith(f"{folder}/"):  # object stores can list the folder itself
            yield name, entry


def _file_system_class(url: str) -> type[AbstractFileSystem]:
    """What fsspec has for the url; ValueError where there is nothing, or where its package is not installed."""
    protocol = split_protocol(url)[0] or "file"
    try:
        return get_filesystem_class(protocol)
    except ValueError:
        raise ValueError(
            f"checkpoint.storage {url}: no file system goes by {protocol}://; give a folder, s3://..., or another of fsspec's"
        ) from None
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        fix = str(error) if package == "fsspec" else f"pip install {package}"
        raise ValueError(f"checkpoint.storage {url}: {fix}") from error
