"""A copy of the run folder, on a mounted disk or in an object store, so that the run can resume on another machine.

    storage = Storage("s3://bucket/runs/mine", Path("runs/mine"))
    storage.move_aside()                                    # a new run: rename the copy of an older one
    storage.pull()                                          # a resumed run: fetch files that are newer in the copy
    storage.push()                                          # after every checkpoint, and at the end
    storage.pull_checkpoint("step_000010", Path("mine"))    # for a worker that does not see the run folder

A run can resume from the copy wherever a push was interrupted: files are uploaded before the files that reference them (see
`_upload_order`), and are removed and fetched in the reverse order. Checkpoints are immutable, so each is uploaded once. Hidden
files and checkpoints that were set aside are not copied. Only one run at a time may write to a copy.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path

from ..common.files import atomic_folder
from ..common.log import logger
from ..run.records import SUMMARY_FILE
from ..run.run_folder import CHECKPOINTS, RUN_FILES, move_aside
from .remote import RemoteFiles, StorageError
from .store import (
    MANIFEST,
    NAME,
    Checkpoint,
    CheckpointStore,
    DamagedCheckpointError,
    read_checkpoint,
    step_of,
    sync,
    sync_all,
)

CHECKPOINT_FILE = re.compile(rf"{CHECKPOINTS}/({NAME.pattern})/")


class Storage:
    """The copy at `url` of the run in `run_dir`. The constructor does not connect.

    Args:
        url: a folder, or an fsspec URL. A relative folder counts from the current one.
        run_dir: the local run folder (`logging.output_dir`); it may not exist yet.

    Attributes:
        url: the same; the absolute path of a local folder.

    Raises:
        ValueError: fsspec has no such file system, its package is not installed, or one folder is inside the other.
    """

    def __init__(self, url: str, run_dir: Path) -> None:
        self._remote = RemoteFiles(url)
        self.url = self._remote.url
        self._run_dir = Path(run_dir)
        self._uploaded: dict[str, int] = {}  # when the local files that were uploaded had been modified
        if self._remote.is_local:
            copy, run = Path(self.url).resolve(), self._run_dir.resolve()
            if copy.is_relative_to(run) or run.is_relative_to(copy):
                raise ValueError(f"checkpoint.storage {url} must not be inside the run folder {run_dir}, nor contain it")

    def move_aside(self) -> str | None:
        """Rename the run at `url`, if there is one, to `<url>.<first free number>` and return that; else None.

        In an object store each file is copied and removed. If that is interrupted, the next call completes it.

        Raises:
            StorageError: the run could not be renamed.
            ValueError: `url` is a local file, or the process works inside the folder.
        """
        if self._remote.is_local:
            try:
                moved = move_aside(Path(self.url), option="checkpoint.storage")
            except OSError as error:
                raise StorageError(f"the copy of the run in {self.url} could not be moved aside: {error}") from error
            return None if moved is None else str(moved)
        files = sorted(self._remote.sizes(), key=_upload_order)
        if not any(file in RUN_FILES for file in files):
            return None
        number = 1
        while RemoteFiles(f"{self.url}.{number}").sizes():
            number += 1
        self._remote.move(files, f"{self.url}.{number}")
        return f"{self.url}.{number}"

    # ---------------------------------------------------------------------------------------------- to the copy

    def push(self) -> None:
        """Upload new and changed files, and remove the checkpoints that are no longer in the run folder.

        Nothing is removed while the run folder has no checkpoint.

        Raises:
            StorageError: the copy could not be written. The run can still resume from it; the next push completes it.
        """
        local, remote = self._local_files(), self._remote_files()
        kept = _checkpoints(local)
        copied = _checkpoints(remote) if kept else {}
        resized = {file for file in local if remote.get(file) != local[file].st_size}
        new = [name for name, files in kept.items() if self._is_new_checkpoint(name, not resized.isdisjoint(files))]
        records = [file for file in local if not CHECKPOINT_FILE.match(file)]
        records = [file for file in records if file in resized or self._is_modified(file, local[file])]
        if SUMMARY_FILE in remote and (SUMMARY_FILE not in local or SUMMARY_FILE in records):
            self._remote.remove([SUMMARY_FILE])  # it says that the run is finished, but the run has resumed
        for name in [name for name in copied if name in new or self._is_superseded(name, kept)]:
            self._remove_checkpoint(name, copied.pop(name))
        for file in sorted([*records, *chain.from_iterable(kept[name] for name in new)], key=_upload_order):
            self._upload(file, local[file])
        for name in copied.keys() - kept.keys():
            self._remove_checkpoint(name, copied[name])

    def _is_modified(self, file: str, status: os.stat_result) -> bool:
        """Whether a file may have changed since its upload. Completions of the same size are the same."""
        unknown = status.st_mtime_ns if file.startswith("completions/") else None
        return self._uploaded.get(file, unknown) != status.st_mtime_ns

    def _is_new_checkpoint(self, name: str, is_resized: bool) -> bool:
        """Whether the copy lacks this checkpoint: the size of a file differs, or the manifest, which has all checksums.

        One that is damaged here is not new, since the copy may have it undamaged.
        """
        manifest = self._run_dir / _manifest_of(name)
        try:
            read_checkpoint(manifest.parent, checksums=False)
        except ValueError:
            return False
        return is_resized or self._remote.read(_manifest_of(name)) != manifest.read_bytes()

    def _is_superseded(self, name: str, kept: Iterable[str]) -> bool:
        """Whether a checkpoint of the copy does not belong to the local records, since the run has resumed from an earlier one.

        It must be removed before the records are uploaded. Others that were deleted here serve until the new ones are complete.
        """
        is_set_aside = any((self._run_dir / CHECKPOINTS).glob(f"{name}.aside.*"))
        return step_of(name) > max(map(step_of, kept)) or (is_set_aside and name not in kept)

    def _upload(self, file: str, status: os.stat_result) -> None:
        try:
            self._remote.write(self._run_dir / file, file)
        except StorageError:
            if (self._run_dir / file).is_file():
                raise
            return  # trackers delete files
        self._uploaded[file] = status.st_mtime_ns

    def _remove_checkpoint(self, name: str, files: list[str]) -> None:
        self._remote.remove(reversed(files))
        self._remote.remove_empty_folder(f"{CHECKPOINTS}/{name}")

    # -------------------------------------------------------------------------------------------- from the copy

    def pull(self, *, always: bool = False) -> None:
        """Before a run resumes: fetch it if the copy has a newer complete checkpoint, or if only the copy has the run.

        Then the records are replaced, and all checkpoints that are missing here are fetched. The next pull completes an
        interrupted one. The caller must hold the lock of the run folder. If the folder's newest checkpoint is of another run,
        the folder is moved aside first.

        Args:
            always: replace the records even if no checkpoint is newer (the run was finished on another machine).

        Raises:
            StorageError: the copy could not be read.
            OSError: the run folder could not be written.
            ValueError: a checkpoint has another format; the message names it.
        """
        remote = self._remote_files()
        copied = _complete_checkpoints(remote)
        is_only_remote = SUMMARY_FILE in remote and not any((self._run_dir / file).exists() for file in RUN_FILES)
        if not (copied or is_only_remote):
            return
        store = CheckpointStore(self._run_dir / CHECKPOINTS, keep_last=1, keep_best=0)
        newest = store.newest_complete(log_skipped=False)
        if newest is not None and copied and self._is_of_another_run(newest, next(iter(copied))):
            logger.info("another run that was in %s is now in %s", self._run_dir, move_aside(self._run_dir))
            newest = None
        ahead = [name for name in copied if newest is None or step_of(name) > newest.step]
        if not (ahead or is_only_remote or always):
            return

        store.tidy()
        fetched: list[str] = []
        # Committed at the end of the block, the newest last, after the records too: an interrupted pull is repeated.
        with ExitStack() as commits:
            for name, files in copied.items():
                if name in ahead or not (store.folder / name).exists():
                    try:
                        commits.enter_context(self._fetched(name, files, store.folder))
                        fetched.insert(0, name)
                    except DamagedCheckpointError as error:
                        logger.info("skipped %s", error)
            replaces_records = is_only_remote or always or not set(fetched).isdisjoint(ahead)
            if replaces_records:
                self._fetch_records(remote)
                fetched.append("records")
        if replaces_records and SUMMARY_FILE in remote:
            self._remote.fetch(SUMMARY_FILE, self._run_dir / SUMMARY_FILE)
        if fetched:
            logger.info("fetched from %s: %s", self.url, ", ".join(fetched))

    def pull_checkpoint(self, name: str, folder: Path) -> Path:
        """Fetch one checkpoint, such as `step_000010`, and return its path in `folder`; one of that name there is replaced.

        `folder` is for the checkpoints of this process only; it is made if it is missing.

        Raises:
            StorageError: the copy could not be read.
            OSError: `folder` could not be written.
            ValueError: the checkpoint is not in the copy, is damaged, or has another format; the message has its URL.
        """
        copied = _complete_checkpoints(self._remote_files())
        if name not in copied:
            raise ValueError(f"{self.url} has no checkpoint {name}, but {', '.join(copied) or 'none at all'}")
        with self._fetched(name, copied[name], Path(folder)) as path:
            return path

    def _is_of_another_run(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a checkpoint of the copy is of another run than this local one; False if its manifest is damaged."""
        try:
            run = json.loads(self._remote.read(_manifest_of(name))).get("run")
        except (ValueError, AttributeError):
            return False
        return run is not None and checkpoint.run is not None and run != checkpoint.run

    @contextmanager
    def _fetched(self, name: str, files: list[str], folder: Path) -> Iterator[Path]:
        """Fetch and verify a checkpoint of the copy. It has the path inside `folder` once the block ends without an error.

        Raises:
            ValueError: it is damaged, or has another format; the message has its URL.
        """
        with atomic_folder(folder / name) as partial:
            for file in files:
                self._remote.fetch(file, partial / file.removeprefix(f"{CHECKPOINTS}/{name}/"))
            try:
                read_checkpoint(partial)
            except ValueError as error:
                raise type(error)(str(error).replace(str(partial), f"{self.url}/{CHECKPOINTS}/{name}")) from None
            sync_all(partial)
            yield folder / name
        sync(folder)

    def _fetch_records(self, remote: Iterable[str]) -> None:
        """All but the summary. The files that show that a folder holds a run come last."""
        (self._run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # it may be of an earlier end of the run
        for file in sorted(remote, key=_upload_order, reverse=True):
            if file != SUMMARY_FILE and not CHECKPOINT_FILE.match(file):
                self._remote.fetch(file, self._run_dir / file)

    # ------------------------------------------------------------------------------------------------- listings

    def _local_files(self) -> dict[str, os.stat_result]:
        """All files of the run folder that are copied, by their paths in it."""
        files = {}
        for path in (Path(folder, name) for folder, _, names in os.walk(self._run_dir) for name in names):
            file = path.relative_to(self._run_dir).as_posix()
            with suppress(FileNotFoundError):  # trackers delete files
                if _is_copied(file):
                    files[file] = path.stat()
        return files

    def _remote_files(self) -> dict[str, int]:
        """Sizes in bytes of all files of the copy, by their paths in it."""
        return {file: size for file, size in self._remote.sizes().items() if _is_copied(file)}


def _is_copied(file: str) -> bool:
    """Whether a file is part of the copy: not if it is hidden, or in a checkpoint that was set aside."""
    is_hidden = any(part.startswith(".") for part in file.split("/"))
    return not is_hidden and (not file.startswith(f"{CHECKPOINTS}/") or CHECKPOINT_FILE.match(file) is not None)


def _upload_order(file: str) -> tuple[int, int, bool]:
    """Sorts files before the files that reference them; the newest checkpoint comes before older ones.

    The files that show that a folder holds a run come first, so they are removed and fetched last. A file of a tracker that
    cannot be uploaded must not keep the checkpoints from the copy, so these come before.
    """
    if checkpoint := CHECKPOINT_FILE.match(file):
        return 2, -step_of(checkpoint[1]), file.endswith(MANIFEST)
    if file == SUMMARY_FILE:
        return 4, 0, False
    return 0 if file in RUN_FILES else 1 if file.startswith("completions/") else 3, 0, False


def _checkpoints(files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each checkpoint, the manifest last; the newest checkpoint first."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files, key=_upload_order):
        if match := CHECKPOINT_FILE.match(file):
            found[match[1]].append(file)
    return dict(found)


def _complete_checkpoints(files: Iterable[str]) -> dict[str, list[str]]:
    """Those that have a manifest."""
    return {name: members for name, members in _checkpoints(files).items() if _manifest_of(name) in members}


def _manifest_of(checkpoint: str) -> str:
    return f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}"
