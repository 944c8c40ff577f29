"""Data sets that are folders, here or on the Hub: their splits, and the rows of each.

    folder_splits("data/sums", subset=None, read=read)          # files, or what `save_to_disk` wrote
    hub_splits("openai/gsm8k", subset="main", read=read)

`datasets` finds the files of each split, as in `load_dataset`, and reads formats with types on the Hub. JSON, CSV and text,
whose types it would guess, and files of a local folder, which may differ in their columns, are read by `files.read_file`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Container
from os.path import expanduser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import datasets
import datasets.config
from datasets.exceptions import DatasetsError

from ..common.errors import first_line
from ..common.files import atomic_write
from ..common.log import logger
from ..config.paths import DATA_FORMATS, split_suffix
from .quiet import quiet_datasets
from .splits import Part, Splits, one_split
from .values import Row

ReadFile = Callable[[str, str, str], list[Row]]
"""From a local path, its name for messages and its format to its rows."""

Files = dict[str, list[tuple[str, str]]]
"""By split, the local path of each file and its name for messages."""

_GUESSED = frozenset({"json", "csv", "text"})
"""Formats whose types `datasets` would guess."""

_TYPED = frozenset({"parquet", "arrow"})
"""Formats whose files may differ in their columns, for which `datasets` would refuse a folder."""

_NOT_OPTIONS = frozenset({"name", "version", "data_dir", "data_files", "description"})
"""Fields of a builder's configuration that do not change how a file is read."""

_ERRORS = (DatasetsError, OSError, ValueError)


def folder_splits(folder: str, *, subset: str | None, read: ReadFile) -> Splits:
    """The splits of a local folder: one that `save_to_disk` wrote, or one with data files.

    Raises:
        ValueError: it has no data, or more than one format.
    """
    path = Path(expanduser(folder))
    if os.path.isfile(path / "dataset_dict.json") or os.path.isfile(path / "state.json"):
        try:
            saved = datasets.load_from_disk(str(path))
        except _ERRORS as error:
            raise ValueError(f"cannot load {folder}: {first_line(error)}") from error
        return one_split(folder, lambda: saved) if isinstance(saved, datasets.Dataset) else splits_of(saved, folder)
    with tempfile.TemporaryDirectory() as cache:  # an edited file is read again
        return _splits_of_files(folder, location=str(path.absolute()), subset=subset, read=read, cache=cache)


def hub_splits(name: str, *, subset: str | None, read: ReadFile) -> Splits:
    """The splits of a data set on the Hub.

    Raises:
        ValueError: it does not exist, or cannot be reached.
    """
    try:
        return _splits_of_files(name, location=name, subset=subset, read=read, cache=None)
    except ValueError as error:
        reason = str(error)
    except ConnectionError:
        reason = (
            f"cannot reach the Hub for data set {name!r}, and the local cache lacks its files: go online once, or name a file"
        )
    folder, slash, _ = name.partition("/")
    if slash and os.path.isdir(folder):  # a misspelled path is likelier
        raise ValueError(f"no file or folder {name}, and no data set: {reason}")
    raise ValueError(f"{reason} (no file or folder is called {name})")


def splits_of(loaded: datasets.Dataset | datasets.DatasetDict, source: str) -> Splits:
    """The splits of a `DatasetDict` by name; a `Dataset` is one split, whatever its name."""
    if isinstance(loaded, datasets.Dataset):
        return Splits(source, None, lambda name: loaded)
    by_name = {str(name): one for name, one in loaded.items()}  # a key may be a `datasets.Split`
    return Splits(source, tuple(by_name), by_name.__getitem__)


def _splits_of_files(name: str, *, location: str, subset: str | None, read: ReadFile, cache: str | None) -> Splits:
    """`location`: a local folder, or an id on the Hub. `cache`: None: that of `datasets`, for the Hub."""
    with quiet_datasets():
        try:
            builder = datasets.load_dataset_builder(location, subset, cache_dir=cache)
            if cache is not None:
                _note_unread_files(name, Path(location), builder)
            elif _may_be_guessed(builder, name, subset):  # by the Hub's viewer, which has types for files without any
                builder = datasets.load_dataset_builder(location, subset, revision=builder.hash)
            format = _format_read_here(builder, _GUESSED if cache is None else _GUESSED | _TYPED)
            if format is None:
                loaded = datasets.load_dataset(location, subset, cache_dir=cache, keep_in_memory=cache is not None)
                if cache is None:
                    _remember(name, subset, {}, None)
                return splits_of(loaded, name)
            files = {str(split): list(of_split) for split, of_split in (builder.config.data_files or {}).items()}
            local: Any = datasets.DownloadManager(dataset_name=builder.dataset_name).download(files)
            found = {split: list(zip(map(str, local[split]), map(str, files[split]), strict=True)) for split in files}
            if cache is None:
                _remember(name, subset, found, format)
        except ConnectionError as error:
            remembered = _remembered(name, subset)
            if remembered is None or (format := remembered[1]) is None:
                raise ConnectionError(str(error)) from error
            found = remembered[0]
        except _ERRORS as error:
            raise ValueError(f"cannot load data set {name!r}: {_reason(error)}") from error

    def rows(split: str) -> Part:
        found_rows: list[Row] = []
        for path, shown in found[split]:
            found_rows += read(path, shown, DATA_FORMATS.get(split_suffix(shown)[0], format))
        return found_rows

    return Splits(name, tuple(found), rows)


def _may_be_guessed(builder: datasets.DatasetBuilder, name: str, subset: str | None) -> bool:
    """Whether the types of a data set on the Hub may be guessed ones: its files have none.

    Raises:
        ConnectionError: the Hub cannot be reached, and what `datasets` has prepared may have such types.
    """
    is_offline = type(builder).__module__.startswith("datasets.packaged_modules.cache.")
    if is_offline and builder.info.builder_name in _GUESSED:
        known = _remembered(name, subset)
        if known is None or known[1] is not None:
            raise ConnectionError(f"the types of {name} may be guessed")
    return type(builder).__module__.rpartition(".")[2] in _GUESSED


def _index(name: str, subset: str | None) -> Path:
    """Where the files of a data set on the Hub are written down: offline, `datasets` knows only what it has prepared itself."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rankup" / name.replace("/", "___")
    return folder / f"{quote(subset or 'default', safe='')}.json"


def _remember(name: str, subset: str | None, files: Files, format: str | None) -> None:
    """`format`: None: `datasets` has prepared the data set, with types that its authors declare."""
    index = _index(name, subset)
    with contextlib.suppress(OSError):  # a cache that cannot be written to, or another worker that writes the same
        index.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(index, json.dumps({"format": format, "files": files}).encode())


def _remembered(name: str, subset: str | None) -> tuple[Files, str | None] | None:
    """The arguments of `_remember`, if all files are still in the cache."""
    index = _index(name, subset)
    if not os.path.isfile(index):
        return None
    known = json.loads(index.read_bytes())
    files: Files = {split: [(path, shown) for path, shown in of_split] for split, of_split in known["files"].items()}
    is_complete = all(os.path.isfile(path) for of_split in files.values() for path, _ in of_split)
    return (files, known["format"]) if is_complete else None


def _reason(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    if lines and lines[0].startswith("Config name is missing"):  # the second line has the names
        return f"{' '.join(lines[:2])} (data.subset)"
    hint = " (formats by suffix in lower case; or name the files, or a pattern)" if isinstance(error, FileNotFoundError) else ""
    return first_line(error.__cause__ or error) + hint


def _format_read_here(builder: datasets.DatasetBuilder, formats: Container[str]) -> str | None:
    """The format of a data set that declares no types of columns and no options of its own for reading; None for others."""
    package, _, format = type(builder).__module__.rpartition(".")
    if not package.startswith("datasets.packaged_modules.") or format not in formats or builder.info.features is not None:
        return None
    config, default = builder.config, type(builder.config)()
    names = {field.name for field in dataclasses.fields(config)} - _NOT_OPTIONS
    if getattr(config, "sep", ",") in (",", ";", "\t"):  # found here, too
        names -= {"sep"}
    return format if all(getattr(config, name) == getattr(default, name) for name in names) else None


def _note_unread_files(name: str, folder: Path, builder: datasets.DatasetBuilder) -> None:
    """Say which data files belong to no split: `datasets` reads one format of a folder, and suffixes in lower case only."""
    read = {os.path.realpath(file) for files in (builder.config.data_files or {}).values() for file in files}
    unread = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if DATA_FORMATS.get(split_suffix(path.name)[0], "text") != "text"
        and os.path.realpath(path) not in read
        and path.name not in ("config.json", "dataset_info.json", "dataset_infos.json")
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]
    if unread:
        logger.info(f"{name}: not read, since they are in no split: {', '.join(unread[:5])}{', ...' if unread[5:] else ''}")
