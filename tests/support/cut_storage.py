"""File systems in memory that record their calls and fail at a chosen one, in the middle of a file.

    register_implementation("cut", CutFileSystem, clobber=True)
    with CutFileSystem.failing_after(3): ...        # the fourth call that changes or fetches a file fails, and all after it
    CutFileSystem.calls                             # [("put", "runs/mine/metrics.jsonl"), ...]

Records are written atomically, as in an object store; the files of checkpoints are left half written, as by others. The files
are shared with `memory://`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class CutFileSystem(MemoryFileSystem):
    """`cut://bucket/path`. All instances share their calls."""

    protocol = "cut"
    calls: ClassVar[list[tuple[str, str]]] = []
    calls_left: ClassVar[int | None] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("cut://"))

    @classmethod
    @contextmanager
    def failing_after(cls, num_calls: int) -> Iterator[None]:
        """Inside the block the first `num_calls` calls succeed, and all later ones fail."""
        cls.calls_left = num_calls
        try:
            yield
        finally:
            cls.calls_left = None

    def _is_cut(self, kind: str, path: str) -> bool:
        CutFileSystem.calls.append((kind, path))
        if self.calls_left is None:
            return False
        CutFileSystem.calls_left = self.calls_left - 1
        return self.calls_left < 0

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if self._is_cut("put", rpath):
            if "/checkpoints/" in rpath:
                data = Path(lpath).read_bytes()
                self.pipe_file(rpath, data[: len(data) // 2])
            raise ConnectionError("the connection was lost")
        super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        if self._is_cut("get", rpath):
            data = self.cat_file(rpath)
            Path(lpath).write_bytes(data[: len(data) // 2])
            raise ConnectionError("the connection was lost")
        super().get_file(rpath, lpath, *args, **kwargs)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        if self._is_cut("copy", path2):
            data = self.cat_file(path1)
            self.pipe_file(path2, data[: len(data) // 2])
            raise ConnectionError("the connection was lost")
        super().cp_file(path1, path2, **kwargs)

    def rm_file(self, path: str) -> None:
        if self._is_cut("remove", path):
            raise ConnectionError("the connection was lost")
        super().rm_file(path)


class RenamingFileSystem(CutFileSystem):
    """`renaming://bucket/path`: it renames folders, and copies no files, like fsspec's sftp and smb."""

    protocol = "renaming"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("renaming://"))

    def mv(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        for path in self.find(path1):
            super().cp_file(path, path2 + path.removeprefix(path1))
        self.rm(path1, recursive=True)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        raise NotImplementedError
