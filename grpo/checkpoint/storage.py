"""A copy of the run folder, on a mounted disk or in an object store: from it the run goes on on another machine.

    storage = Storage("s3://bucket/runs/mine", Path("runs/mine"))
    storage.move_aside()                                    # a new run: one that is there gets another name
    storage.pull(say=print)                                 # a run that is taken up: what the copy has and this machine has not
    storage.push()                                          # after every checkpoint, and at the end
    storage.pull_checkpoint("step_000010", Path("mine"))    # for a worker that does not see the run folder

Whatever ends a push, the run can go on from the copy. What speaks of something comes after it: a checkpoint after the records
that it counts, its manifest after its other files, the summary after everything; what is removed goes in the other order.
Hidden files and checkpoints that were set aside are not copied. One run at a time has a copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..run.records import SUMMARY_FILE
from ..run.run_folder import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, move_aside
from .remote import RemoteFiles, StorageError
from .store import (
    MANIFEST,
    NAME,
    Checkpoint,
    CheckpointStore,
    DamagedCheckpointError,
    read_checkpoint,
    read_manifest,
    step_of,
    sync_all,
)

COMPLETIONS = "completions/"
RUN_MARKS = (CONFIG_FILE, METRICS_FILE)  # show that a folder holds a run


class Storage:
    """The copy at `url` of the run in `run_dir`. Nothing is asked of the other side before the first call of a method.

    Args:
        url: a folder, or a path of any of fsspec's file systems; a relative folder counts from the current one.
        run_dir: the run's folder here (`logging.output_dir`); it need not exist.

    Attributes:
        url: the same, of a local folder the absolute path.

    Raises:
        ValueError: no such kind of file system, its package is not installed, or the two folders lie in one another.
    """

    def __init__(self, url: str, run_dir: Path) -> None:
        self._there = RemoteFiles(url)
        self.url = self._there.url
        self._run_dir = Path(run_dir)
        self._known: dict[str, tuple[int, int]] = {}  # stamps of files here when the copy was last seen to be the same
        if self._there.is_local:
            copy, run = Path(self.url).resolve(), self._run_dir.resolve()
            if copy.is_relative_to(run) or run.is_relative_to(copy):
                raise ValueError(f"checkpoint.storage {url} and the run folder {run_dir} lie in one another; give another one")

    def move_aside(self) -> str | None:
        """Rename a run that is there to `<path>.<first free number>` and return its url; None where none is.

        Other than a local folder, it is copied and removed file by file: cut off, that leaves the run where it was, or what
        the next call moves away.

        Raises:
            StorageError: it could not be done.
            ValueError: a local folder is a file, or the process works inside it.
        """
        self._known.clear()
        if self._there.is_local:
            try:
                moved = move_aside(Path(self.url), option="checkpoint.storage")
            except OSError as error:
                raise StorageError(f"the copy of the run in {self.url} could not be moved aside: {error}") from error
            return None if moved is None else str(moved)
        names = list(self._there.sizes())
        if not any(name in RUN_MARKS for name in names):
            return None
        number = 1
        while self._there.sizes(f".{number}"):
            number += 1
        self._there.copy([name for name in names if not _is_manifest(name)], f".{number}")
        self._there.copy([name for name in names if _is_manifest(name)], f".{number}")
        self._there.remove(sorted(names, key=lambda name: (name in RUN_MARKS, not _is_manifest(name))))
        return f"{self.url}.{number}"

    # ---------------------------------------------------------------------------------------------- to the copy

    def push(self) -> None:
        """Bring the copy to where the run is: what is new or changed here is written, checkpoints deleted here are deleted.

        Of files that this object has not seen in both places, only checkpoints (by their manifest) and completions (by their
        size) are taken for the same. Where no checkpoint is here, none is deleted there.

        Raises:
            StorageError: the copy could not be written. The run can still go on from it, and the next push makes up for it.
        """
        here, there = self._files_here(), self._files_there()
        if SUMMARY_FILE in there and (SUMMARY_FILE not in here or self._is_news(SUMMARY_FILE, here, there)):
            self._remove([SUMMARY_FILE])  # it says that a run has ended, and this one has gone on
        kept = _checkpoints(here)
        news = [name for name in kept if self._is_news_of_checkpoint(name, here, there)]
        for name in self._contradicted(kept, news, there):
            self._remove_checkpoint(name, there)
        records = [name for name in here if name in RUN_MARKS or name.startswith(COMPLETIONS)]
        self._write_news(records, here, there)
        for name in news:
            for file in sorted(_files_of(name, here), key=_is_manifest):
                self._write(file, here[file])
        for name in _checkpoints(there) if kept else ():
            if name not in kept:
                self._remove_checkpoint(name, there)
        others = [name for name in here if name not in records and not name.startswith(f"{CHECKPOINTS}/")]
        self._write_news(sorted(others, key=lambda name: name == SUMMARY_FILE), here, there)

    def _contradicted(self, kept: list[str], news: list[str], there: dict[str, int]) -> list[str]:
        """Checkpoints there that the records here do not lead to, for the run has gone on otherwise.

        They go before the records come. Others that are deleted here are of use until the new one is there.
        """
        if not kept:
            return []
        folder, newest = self._run_dir / CHECKPOINTS, step_of(Path(kept[0]))
        return [
            name
            for name in _checkpoints(there)
            if name in news or step_of(Path(name)) > newest or (name not in kept and any(folder.glob(f"{name}.aside.*")))
        ]

    def _is_news_of_checkpoint(self, name: str, here: dict[str, tuple[int, int]], there: dict[str, int]) -> bool:
        """Whether the copy has not this very checkpoint. Manifests are compared, they have the checksums of all files.

        One that is damaged here is none: the copy's may be whole.
        """
        manifest = _manifest_of(name)
        try:
            listed = read_manifest(self._run_dir / CHECKPOINTS / name)["files"]
        except ValueError:
            return False
        sizes = {f"{CHECKPOINTS}/{name}/{file}": entry["bytes"] for file, entry in listed.items()}
        if any(file not in here or here[file][0] != size for file, size in sizes.items()):
            return False
        if manifest not in there or any(there.get(file) != size for file, size in sizes.items()):
            return True
        if self._known.get(manifest) != here[manifest]:
            if self._there.read(manifest) != (self._run_dir / manifest).read_bytes():
                return True
            self._known[manifest] = here[manifest]
        return False

    def _is_news(self, name: str, here: dict[str, tuple[int, int]], there: dict[str, int]) -> bool:
        stamp = here[name]
        is_same = self._known.get(name, stamp if name.startswith(COMPLETIONS) else None) == stamp
        return not is_same or there.get(name) != stamp[0]

    def _write_news(self, names: Iterable[str], here: dict[str, tuple[int, int]], there: dict[str, int]) -> None:
        for name in names:
            if self._is_news(name, here, there):
                self._write(name, here[name])

    def _write(self, name: str, stamp: tuple[int, int]) -> None:
        self._known.pop(name, None)
        with suppress(FileNotFoundError):  # trackers delete files of their own
            self._there.write(self._run_dir / name, name)
            self._known[name] = stamp

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._known.pop(name, None)
        self._there.remove(names)

    def _remove_checkpoint(self, name: str, there: dict[str, int]) -> None:
        """Remove it, its manifest first, from `there` too."""
        files = sorted(_files_of(name, there), key=_is_manifest, reverse=True)
        self._remove(files)
        self._there.remove_folder(f"{CHECKPOINTS}/{name}")
        for file in files:
            del there[file]

    # -------------------------------------------------------------------------------------------- from the copy

    def pull(self, say: Callable[[str], None], *, always: bool = False) -> None:
        """Before a run is taken up: fetch it if the copy has a newer checkpoint than is whole here, or if only the copy has it.

        Records are replaced then, and all checkpoints come that are missing here; `say` is told which, and why others were
        skipped. A pull that is cut off is made up for by the next one. The caller owns the run folder. Another run that is in
        it, by its newest checkpoint, is moved aside first.

        Args:
            always: replace records even where no checkpoint is newer: the run has ended, and went on elsewhere.

        Raises:
            StorageError: the copy could not be read.
            OSError: it could not be written here.
            ValueError: a checkpoint has another format; the message names it.
        """
        there = self._files_there()
        names = _whole_checkpoints(there)
        is_only_there = SUMMARY_FILE in there and not any((self._run_dir / name).exists() for name in RUN_MARKS)
        if not (names or is_only_there):
            return
        store = CheckpointStore(self._run_dir / CHECKPOINTS, keep_last=1, keep_best=0)
        newest = store.newest_whole()
        if newest is not None and names and self._is_of_another_run(newest, names[0]):
            say(f"another run that was in {self._run_dir} is now in {move_aside(self._run_dir)}")
            self._known.clear()
            newest = None
        ahead = [name for name in names if newest is None or step_of(Path(name)) > newest.step]
        if not (ahead or is_only_there or always):
            return
        store.tidy()
        staged = {}
        for name in names:
            if name in ahead or not (store.folder / name).exists():
                try:
                    staged[name] = self._stage(name, store, there)
                except DamagedCheckpointError as error:
                    say(f"skipped {error}")
        # Records belong to the newest checkpoint. It gets its name after they are here and after the older ones have theirs, so
        # that a pull that was cut off is seen to be needed again.
        takes_records = is_only_there or always or any(name in ahead for name in staged)
        if takes_records:
            self._fetch_records(there)
        for partial in reversed(staged.values()):
            store.place(partial)
        if takes_records and SUMMARY_FILE in there:
            self._fetch_record(SUMMARY_FILE)
        if taken := [*reversed(staged), *(["records"] if takes_records else [])]:
            say(f"taken from {self.url}: {', '.join(taken)}")

    def _is_of_another_run(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether the copy's checkpoint is of another run than this one; one that cannot be read is not said to be."""
        try:
            run = json.loads(self._there.read(_manifest_of(name))).get("run")
        except (ValueError, AttributeError):
            return False
        return run is not None and checkpoint.run is not None and run != checkpoint.run

    def pull_checkpoint(self, name: str, folder: Path) -> Path:
        """Fetch one checkpoint, such as `step_000010`, and return its path in `folder`; one of that name there is replaced.

        folder: this process's own, for checkpoints only; it is made where it is missing.

        Raises:
            StorageError: the copy could not be read.
            OSError: it could not be written here.
            ValueError: it is not in the copy, or it is damaged or of another format; the message says where.
        """
        there = self._files_there()
        names = _whole_checkpoints(there)
        if name not in names:
            raise ValueError(f"{self.url} has no checkpoint {name}, but {', '.join(names) or 'none at all'}")
        store = CheckpointStore(Path(folder), keep_last=1, keep_best=0)
        store.tidy()
        return store.place(self._stage(name, store, there))

    def _stage(self, name: str, store: CheckpointStore, there: dict[str, int]) -> Path:
        """The hidden folder in which the checkpoint is whole and on the disk.

        Raises:
            DamagedCheckpointError, or ValueError for another format: with its place in the copy.
        """
        partial, prefix = store.partial(name), f"{CHECKPOINTS}/{name}/"
        partial.mkdir(parents=True)
        for file in _files_of(name, there):
            self._there.fetch(file, partial / file.removeprefix(prefix))
        try:
            read_checkpoint(partial)
        except ValueError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise type(error)(str(error).replace(str(partial), f"{self.url}/{CHECKPOINTS}/{name}")) from None
        sync_all(partial)
        return partial

    def _fetch_records(self, there: dict[str, int]) -> None:
        """All but checkpoints and summary. What shows that there is a run comes last."""
        (self._run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of a run that had ended here
        names = [name for name in there if name != SUMMARY_FILE and not name.startswith(f"{CHECKPOINTS}/")]
        for name in sorted(names, key=lambda name: name in RUN_MARKS):
            self._fetch_record(name)

    def _fetch_record(self, name: str) -> None:
        self._there.fetch(name, self._run_dir / name)
        self._known[name] = _stamp(self._run_dir / name)

    # ------------------------------------------------------------------------------------- files here and there

    def _files_here(self) -> dict[str, tuple[int, int]]:
        """Stamps of all files that are copied, by their paths in the run folder."""
        stamps = {}
        for folder, _, names in os.walk(self._run_dir):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self._run_dir).as_posix()
                if _is_copied(name) and path.is_file():
                    with suppress(FileNotFoundError):  # trackers delete files of their own
                        stamps[name] = _stamp(path)
        return stamps

    def _files_there(self) -> dict[str, int]:
        """Sizes of all files of the copy, by their paths in it."""
        return {name: size for name, size in self._there.sizes().items() if _is_copied(name)}


def _is_copied(name: str) -> bool:
    """Whether a file is, by its path in the run folder: none that is hidden, and of checkpoints those that have their name."""
    first, *rest = parts = name.split("/")
    is_no_checkpoint = first == CHECKPOINTS and (len(rest) < 2 or not NAME.fullmatch(rest[0]))
    return not is_no_checkpoint and not any(part.startswith(".") for part in parts)


def _stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _checkpoints(files: Iterable[str]) -> list[str]:
    """Names of all checkpoints that have a file, the newest first."""
    names = {name.split("/")[1] for name in files if name.startswith(f"{CHECKPOINTS}/")}
    return sorted(names, key=lambda name: step_of(Path(name)), reverse=True)


def _whole_checkpoints(files: Mapping[str, Any]) -> list[str]:
    """Names of those that were written to their end, the newest first."""
    return [name for name in _checkpoints(files) if _manifest_of(name) in files]


def _files_of(checkpoint: str, files: Iterable[str]) -> list[str]:
    return [name for name in files if name.startswith(f"{CHECKPOINTS}/{checkpoint}/")]


def _manifest_of(checkpoint: str) -> str:
    return f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}"


def _is_manifest(name: str) -> bool:
    return name.endswith(f"/{MANIFEST}")
