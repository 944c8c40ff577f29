"""The files of a run at an fsspec URL: a folder, a mounted disk, an object store.

    files = RemoteFiles("s3://bucket/runs/mine")
    files.write(Path("runs/mine/metrics.jsonl"), "metrics.jsonl")
    files.sizes()                                   # {"metrics.jsonl": 1234}
    files.fetch("metrics.jsonl", Path("copy/metrics.jsonl"))
    files.remove(["metrics.jsonl"])

Local folders and object stores replace a file atomically. Other file systems (sftp, smb) can leave a truncated one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from ..common.files import atomic_path


class StorageError(OSError):
    """The copy of a run could not be reached, read or written. The message, one line, has its URL and the reason."""


class RemoteFiles:
    """The files under `url`, by their paths relative to it. The constructor does not connect; methods raise StorageError.

    Attributes:
        url: without a trailing slash; the absolute path of a local folder.
        is_local: whether `url` is a path on this machine.

    Raises:
        ValueError: fsspec has no such file system, its package is not installed, or the URL does not name a folder.
    """

    def __init__(self, url: str) -> None:
        self.is_local = issubclass(_file_system_class(url), LocalFileSystem)
        self.url = url_to_fs(url)[1] if self.is_local else url.rstrip("/")
        if self.is_local:
            return
        if not urlsplit(url).path.strip("/"):
            raise ValueError(f"checkpoint.storage {url} names no folder: give one for the run, such as {self.url}/runs/mine")
        if set(url) & set("*?["):  # fsspec reads them as patterns
            raise ValueError(f"checkpoint.storage {url}: give a path without * ? and [")

    def sizes(self) -> dict[str, int]:
        """The size in bytes of every file; empty if there is no such folder."""
        with self._storage_errors("read"):
            self._fs.invalidate_cache()
            return dict(_walk(self._fs, ""))

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        with self._storage_errors("read"):
            return self._fs.cat_file(name)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to the local path `target` atomically, and make its folder."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary, self._storage_errors("read"):
            self._fs.get_file(name, str(temporary))

    def write(self, source: Path, name: str) -> None:
        """Copy the local file `source` to `name`, or replace that."""
        with self._storage_errors("written"):
            if not self.is_local:
                self._fs.put_file(str(source), name)
                return
            target = Path(self.url, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                self._fs.fs.put_file(str(source), str(temporary))

    def move(self, names: list[str], url: str) -> None:
        """Move the folder, whose files are `names`, to `url`: by one rename if the file system has that, else by copying the
        files in this order and removing them in the reverse order.
        """
        with self._storage_errors("moved aside"):
            fs, root, target = self._fs.fs, self._fs.path, url_to_fs(url)[1]
            if not fs.async_impl and type(fs).mv is not AbstractFileSystem.mv:  # fsspec's object stores are asynchronous
                fs.mv(root, target)
                return
            for name in names:
                if not fs.async_impl:  # object stores have no folders: makedirs would look for the bucket, or make it
                    fs.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
                fs.cp_file(f"{root}/{name}", f"{target}/{name}")
        self.remove(reversed(names))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in this order."""
        with self._storage_errors("written"):
            for name in names:  # one by one, since `rm` reads names as patterns
                self._fs.rm_file(name)

    def remove_empty_folder(self, name: str) -> None:
        """Remove a folder whose files are removed. Object stores have no folders."""
        with self._storage_errors("written"), suppress(FileNotFoundError):
            if not self._fs.fs.async_impl:
                self._fs.rm(name, recursive=True)

    @cached_property
    def _fs(self) -> DirFileSystem:
        with self._storage_errors("opened"):
            fs, root = url_to_fs(self.url)
            return DirFileSystem(root, fs)

    @contextmanager
    def _storage_errors(self, participle: str) -> Iterator[None]:
        try:
            yield
        except StorageError:  # it could not be opened
            raise
        except Exception as error:  # each file system raises different errors: botocore's, aiohttp's, google's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StorageError(f"the copy of the run in {self.url} could not be {participle}: {reason}") from error


def _walk(fs: AbstractFileSystem, folder: str) -> Iterator[tuple[str, int]]:
    """Path and size of every file below a folder. fsspec's `find` and `walk` read some errors as an empty folder."""
    try:
        entries = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return
    for entry in entries:
        name = entry["name"].rstrip("/")
        if name == folder:  # object stores can list the folder itself
            continue
        if entry["type"] == "directory":
            yield from _walk(fs, name)
        else:
            yield name, entry["size"]


def _file_system_class(url: str) -> type[AbstractFileSystem]:
    """The fsspec class for a URL; ValueError if there is none, or if its package is not installed."""
    protocol = split_protocol(url)[0] or "file"
    try:
        return get_filesystem_class(protocol)
    except ValueError:
        raise ValueError(
            f"checkpoint.storage {url}: fsspec has no file system {protocol}://; give a folder, s3://... or another fsspec URL"
        ) from None
    except ImportError as error:
        raise ValueError(f"checkpoint.storage {url}: {error}") from error
