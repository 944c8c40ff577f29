"""A file system in memory whose calls are noted, and which fails at any one of them, in the middle of a file.

    register_implementation("cut", CutFileSystem, clobber=True)
    with CutFileSystem.failing_after(3): ...        # the fourth call that changes or fetches something, and all after it
    CutFileSystem.calls                             # [("put", "runs/mine/metrics.jsonl"), ...]

Records it writes as a whole, like an object store; a checkpoint's file is left half written, as by others. Its files are
among those of `memory://`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class CutFileSystem(MemoryFileSystem):
    """`cut://bucket/path`; all instances share their calls."""

    protocol = "cut"
    calls: ClassVar[list[tuple[str, str]]] = []
    calls_left: ClassVar[int | None] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("cut://"))

    @classmethod
    @contextmanager
    def failing_after(cls, num_calls: int) -> Iterator[None]:
        """Inside the block so many calls succeed, all later ones fail."""
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
            raise ConnectionError("the line was cut")
        super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        if self._is_cut("get", rpath):
            data = self.cat_file(rpath)
            Path(lpath).write_bytes(data[: len(data) // 2])
            raise ConnectionError("the line was cut")
        super().get_file(rpath, lpath, *args, **kwargs)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        if self._is_cut("copy", path2):
            data = self.cat_file(path1)
            self.pipe_file(path2, data[: len(data) // 2])
            raise ConnectionError("the line was cut")
        super().cp_file(path1, path2, **kwargs)

    def rm_file(self, path: str) -> None:
        if self._is_cut("remove", path):
            raise ConnectionError("the line was cut")
        super().rm_file(path)
