"""A copy of the run folder, on a mounted disk or in an object store, so that the run can resume on another machine.

    storage = Storage("s3://bucket/runs/mine", Path("runs/mine"))
    storage.move_aside()                                    # a new run: rename the copy of an older one
    storage.pull()                                          # a resumed run: fetch files that are newer in the copy
    storage.push()                                          # after every checkpoint, and at the end
    storage.pull_checkpoint("step_000010", Path("mine"))    # for a worker that does not see the run folder

A run can resume from the copy wherever a push was interrupted. Files are uploaded before the files that reference them: records
(everything but checkpoints and summary), then checkpoints with their manifests last, then the summary. They are removed in the
reverse order. Checkpoints are immutable, so each is uploaded once. Hidden files and checkpoints that were set aside are not
copied. Only one run at a time may write to a copy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
        self._uploaded: dict[str, os.stat_result] = {}  # state of the local records when they were uploaded
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
        files = list(self._remote.sizes())
        if not any(file in RUN_FILES for file in files):
            return None
        number = 1
        while RemoteFiles(f"{self.url}.{number}").sizes():
            number += 1
        files.sort(key=lambda file: (file not in RUN_FILES, file.endswith(MANIFEST)))
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
        kept, copied = _checkpoints(local), _checkpoints(remote)
        changed = [file for file in local if not CHECKPOINT_FILE.match(file) and self._is_changed(file, local, remote)]
        if SUMMARY_FILE in remote and (SUMMARY_FILE not in local or SUMMARY_FILE in changed):
            self._remote.remove([SUMMARY_FILE])  # it says that the run is finished, but the run has resumed
        new = [name for name in kept if self._is_new_checkpoint(name, remote)]
        for name in self._superseded(list(kept), list(copied), new):
            self._remove_checkpoint(name, copied.pop(name))
        records = [file for file in changed if file in RUN_FILES or file.startswith("completions/")]
        self._upload(records, local)
        for name in new:
            self._upload(kept[name], local)
        # After the checkpoints: a file of a tracker that cannot be uploaded must not keep them from the copy.
        self._upload([file for file in changed if file not in (*records, SUMMARY_FILE)], local)
        for name, files in copied.items() if kept else ():
            if name not in kept:
                self._remove_checkpoint(name, files)
        self._upload([file for file in changed if file == SUMMARY_FILE], local)

    def _is_changed(self, file: str, local: dict[str, os.stat_result], remote: dict[str, int]) -> bool:
        """Whether the copy may have a record in another version. Completions of the same size are the same."""
        now, size = local[file], remote.get(file)
        before = self._uploaded.get(file, now if file.startswith("completions/") else None)
        return before is None or (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns) or size != now.st_size

    def _is_new_checkpoint(self, name: str, remote: dict[str, int]) -> bool:
        """Whether the copy lacks this checkpoint: a file, or its size, or its manifest, which has the checksums of all files.

        One that is damaged here is not new, since the copy may have it undamaged.
        """
        path, manifest = self._run_dir / CHECKPOINTS / name, _manifest_of(name)
        try:
            read_checkpoint(path, checksums=False)
        except ValueError:
            return False
        prefix = f"{CHECKPOINTS}/{name}/"
        local = {f"{prefix}{file.relative_to(path)}": file.stat().st_size for file in path.rglob("*") if file.is_file()}
        if any(remote.get(file) != size for file, size in local.items()):
            return True
        return self._remote.read(manifest) != (path / MANIFEST).read_bytes()

    def _superseded(self, kept: list[str], copied: list[str], new: list[str]) -> list[str]:
        """Checkpoints of the copy that do not belong to the local records, since the run has resumed from an earlier one.

        They are removed before the records are uploaded. Others that were deleted here serve until the new ones are complete.
        """
        if not kept:
            return []
        folder, newest = self._run_dir / CHECKPOINTS, step_of(kept[0])
        return [
            name
            for name in copied
            if name in new or step_of(name) > newest or (name not in kept and any(folder.glob(f"{name}.aside.*")))
        ]

    def _upload(self, files: list[str], local: dict[str, os.stat_result]) -> None:
        for file in files:
            if not (self._run_dir / file).is_file():
                continue  # trackers delete files
            try:
                self._remote.write(self._run_dir / file, file)
            except StorageError:
                if (self._run_dir / file).is_file():
                    raise
                continue  # deleted while it was uploaded
            self._uploaded[file] = local[file]

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
        staged = {}
        for name, files in copied.items():
            if name in ahead or not (store.folder / name).exists():
                try:
                    staged[name] = self._stage(name, files, store)
                except DamagedCheckpointError as error:
                    logger.info("skipped %s", error)
        # The newest checkpoint is committed last, after the records too, so that an interrupted pull is repeated.
        replaces_records = is_only_remote or always or any(name in ahead for name in staged)
        if replaces_records:
            self._fetch_records(remote)
        for partial in reversed(staged.values()):
            store.commit(partial)
        if replaces_records and SUMMARY_FILE in remote:
            self._remote.fetch(SUMMARY_FILE, self._run_dir / SUMMARY_FILE)
        if fetched := [*reversed(staged), *(["records"] if replaces_records else [])]:
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
        store = CheckpointStore(Path(folder), keep_last=1, keep_best=0)
        store.tidy()
        return store.commit(self._stage(name, copied[name], store))

    def _is_of_another_run(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a checkpoint of the copy is of another run than this local one; False if its manifest is damaged."""
        try:
            run = json.loads(self._remote.read(_manifest_of(name))).get("run")
        except (ValueError, AttributeError):
            return False
        return run is not None and checkpoint.run is not None and run != checkpoint.run

    def _stage(self, name: str, files: list[str], store: CheckpointStore) -> Path:
        """Fetch a checkpoint into the hidden folder of its name, verify it, and sync it to the disk."""
        partial = store.partial(name)
        partial.mkdir(parents=True)
        for file in files:
            self._remote.fetch(file, partial / file.removeprefix(f"{CHECKPOINTS}/{name}/"))
        try:
            read_checkpoint(partial)
        except ValueError as error:  # damaged, or of another format
            shutil.rmtree(partial, ignore_errors=True)
            raise type(error)(str(error).replace(str(partial), f"{self.url}/{CHECKPOINTS}/{name}")) from None
        sync_all(partial)
        return partial

    def _fetch_records(self, remote: Iterable[str]) -> None:
        """The files that show that a folder holds a run come last."""
        (self._run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # it may be of an earlier end of the run
        records = [file for file in remote if file != SUMMARY_FILE and not CHECKPOINT_FILE.match(file)]
        for file in sorted(records, key=lambda file: file in RUN_FILES):
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


def _checkpoints(files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each checkpoint, the manifest last; the newest checkpoint first."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.endswith(MANIFEST)):
        if match := CHECKPOINT_FILE.match(file):
            found[match[1]].append(file)
    return {name: found[name] for name in sorted(found, key=step_of, reverse=True)}


def _complete_checkpoints(files: Iterable[str]) -> dict[str, list[str]]:
    """Those that have a manifest."""
    return {name: members for name, members in _checkpoints(files).items() if _manifest_of(name) in members}


def _manifest_of(checkpoint: str) -> str:
    return f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}"
