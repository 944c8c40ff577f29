"""Data files: which ones a name means, and the rows of each.

    files = find_files("data/part-*.jsonl.gz")
    rows = [row for file in files for row in read_file(file, encoding="utf-8", column_types={})]

JSON, CSV and lines of text are read by `text_formats.py`, so that no value is guessed from other rows; formats with types by
pyarrow, and further formats by `datasets`.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os.path import expanduser
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from ...rewards.loading import find_file
from ..common.errors import first_line
from ..config.data import ColumnType
from ..config.paths import DATA_FORMATS, is_pattern, is_url, split_suffix
from .quiet import quiet_datasets
from .tables import table_rows
from .text_formats import LineError, csv_rows, json_rows, text_rows
from .values import Row, with_types

TEXT_FORMATS: dict[str, Callable[[str], Iterator[tuple[int, Row]]]] = {
    "json": json_rows,
    "csv": csv_rows,
    "tsv": partial(csv_rows, delimiter="\t"),
    "text": text_rows,
}


def find_files(name: str) -> list[str]:
    """The files that a path, a glob pattern or a URL means, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_url(name):
        return [name]
    if not is_pattern(name):
        return [str(find_file(name))]
    found = [path for path in glob.glob(str(Path(expanduser(name))), recursive=True) if os.path.isfile(path)]
    if not found:
        raise FileNotFoundError(f"no file matches {name} (names in a run file are also looked up beside it)")
    return sorted(found)


def read_file(
    file: str, *, encoding: str, column_types: Mapping[str, ColumnType], name: str | None = None, format: str | None = None
) -> list[Row]:
    """All rows of a file or a URL.

    Args:
        name: the file in error messages. None: `file`.
        format: one of the values of `DATA_FORMATS`. None: by the name's suffix.

    Raises:
        ValueError: it cannot be read, or has no rows; the message has the line.
    """
    name = name or file
    suffix, compression = split_suffix(name)
    format = format or DATA_FORMATS.get(suffix)
    if compression == ".zip":
        format = "zip"  # the file inside has its own
    if format is None:
        return typed_rows(_read_with_datasets(file), column_types, source=name)
    content = _uncompressed(name, _content(name, file), compression)
    if format == "zip":
        name, content, format = _only_member(name, content)
    if not content:
        raise ValueError(f"{name} is empty")
    rows = (
        _text_rows(name, _decoded(name, content, encoding), format, column_types)
        if format in TEXT_FORMATS
        else _typed_rows(name, content, format, column_types)
    )
    if not rows:
        raise ValueError(f"{name} has no rows")
    return rows


def _text_rows(name: str, text: str, format: str, column_types: Mapping[str, ColumnType]) -> list[Row]:
    rows: list[Row] = []
    try:
        for line, row in TEXT_FORMATS[format](text):
            try:
                rows.append(with_types(row, column_types))
            except ValueError as error:
                raise ValueError(f"{name}, line {line}: {error}") from error
    except LineError as error:
        raise ValueError(f"cannot read {name}, line {error.line}: {error}") from error
    return rows


def _typed_rows(name: str, content: bytes, format: str, column_types: Mapping[str, ColumnType]) -> list[Row]:
    source = pyarrow.BufferReader(content)
    try:
        if format == "parquet":
            table = pyarrow.parquet.read_table(source)
        elif content.startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(source).read_all()
        else:
            table = pyarrow.ipc.open_stream(source).read_all()
        rows = table_rows(table)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"cannot read {name}: {first_line(error)}") from error
    return typed_rows(rows, column_types, source=name)


def typed_rows(rows: list[Row], column_types: Mapping[str, ColumnType], *, source: str) -> list[Row]:
    """The rows with the values of `column_types`. Raises ValueError with the source, the row (from 0) and the column."""
    index = 0
    try:
        for index, row in enumerate(rows if column_types else ()):
            rows[index] = with_types(row, column_types)
    except ValueError as error:
        raise ValueError(f"row {index} of {source}: {error}") from error
    return rows


def _read_with_datasets(file: str) -> list[Row]:
    """Rows of a format that only `datasets` knows, such as XML or HDF5."""
    path = Path(file)
    with quiet_datasets(), tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.load_dataset(
                str(path.parent), data_files=path.name, split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # the libraries of all those formats raise errors of their own
            known = ", ".join(DATA_FORMATS)
            raise ValueError(
                f"cannot read {file}: data files are {known}, and may be compressed (.gz, .xz, ...); `datasets` says: "
                f"{first_line(error.__cause__ or error)}"
            ) from error
        return table_rows(loaded)


# ---------------------------------------------------------------------------------------------------------- content


def _content(name: str, file: str) -> bytes:
    try:
        if not is_url(file):
            return Path(file).read_bytes()
        system, path = fsspec.url_to_fs(file)
        return system.cat_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {name}") from error
    except (OSError, ImportError, ValueError) as error:  # a file system that is not installed is an ImportError
        raise ValueError(f"cannot read {name}: {first_line(error)}") from error


def _uncompressed(name: str, content: bytes, compression: str) -> bytes:
    try:
        if compression == ".gz":
            return gzip.decompress(content)
        if compression == ".bz2":
            return bz2.decompress(content)
        if compression == ".xz":
            return lzma.decompress(content)
        if compression in (".zst", ".lz4"):
            codec = compression.removeprefix(".").replace("zst", "zstd")
            return pyarrow.input_stream(pyarrow.py_buffer(content), compression=codec).read()
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {name}: {first_line(error)} (is the file complete?)") from error
    return content


def _only_member(name: str, content: bytes) -> tuple[str, bytes, str]:
    """Name, content and format of the one file in a zip archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [member for member in archive.namelist() if not member.endswith("/")]
            if len(members) != 1:
                raise ValueError(f"{name} has {len(members)} files: unpack it")
            inside = archive.read(members[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"cannot read {name}: {first_line(error)}") from error
    format = DATA_FORMATS.get(split_suffix(members[0])[0])
    if format is None:
        raise ValueError(f"cannot read {members[0]} in {name}: data files are {', '.join(DATA_FORMATS)}")
    return f"{name}/{members[0]}", inside, format


def _decoded(name: str, content: bytes, encoding: str) -> str:
    """Text without its byte-order mark."""
    try:
        return content.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(
            f"cannot read {name}, line {line}: byte {error.start} of the file (0x{content[error.start]:02x}) is not "
            f"{encoding.upper()}: set data.encoding to its encoding, {'utf-16' if marked else 'such as latin-1'}"
        ) from error
