"""Where rows come from: files, folders, the Hub, Reasoning Gym tasks, functions, rows in memory, or streams.

    rows = load_rows("data/train.jsonl", split="train")
    rows = load_rows(["a.jsonl", "b-*.csv.gz"], split="train[:1000]", column_types={"answer": "int"})
    rows = load_rows(endless_generator(), split="train", stream_rows=lambda: 800)       # the first 800

A stream is a source without a length: an iterator, a generator, a `datasets.IterableDataset`. It may be infinite.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeGuard

import datasets
import pandas
import pyarrow

from ...rewards.contract import is_interruption
from ...rewards.loading import load_object
from ...rewards.texts import describe
from ..config.data import ColumnType, EvalSet
from ..config.functions import text_of
from ..config.paths import names_files
from .files import find_files, read_file, typed_rows
from .folders import folder_splits, hub_splits, splits_of
from .gym_tasks import gym_rows
from .padding import unpadded, unpadded_arrays
from .splits import Part, Splits, is_partial, one_split
from .tables import frame_rows, table_rows
from .values import Row, plain_rows

Rows = Iterable[Mapping[str, Any]]

Named = str | Path
"""A source by name."""

DataSource = (
    Named
    | Sequence[Named]
    | datasets.Dataset
    | datasets.IterableDataset
    | datasets.DatasetDict
    | datasets.IterableDatasetDict
    | pandas.DataFrame
    | pyarrow.Table
    | Rows
    | Callable[..., Rows]
)
"""Sources of rows by name, a data set, rows in memory, a stream, or a function that returns them; see `load_rows`."""

EvalSource = DataSource | Mapping[str, DataSource] | Mapping[str, DataSource | EvalSet]
"""One data set for evaluation, or several by name. A dictionary of splits is several data sets."""

_REASONING_GYM = "reasoning_gym:"


def load_rows(
    source: DataSource,
    *,
    split: str,
    subset: str | None = None,
    options: Mapping[str, Any] | None = None,
    stream_rows: Callable[[], int | None] = lambda: None,
    encoding: str = "utf-8",
    column_types: Mapping[str, ColumnType] | None = None,
) -> list[Row]:
    """Read all rows of a data set into memory, or the first ones of a stream. `source` is one of:

    - the path or URL of a data file (`DATA_FORMATS`, compressed or not), or a glob pattern, relative to the working directory;
    - a folder with data files, or one that `save_to_disk` wrote;
    - the id of a data set on the Hub (with `subset` if it has several);
    - `reasoning_gym:<task>`: columns prompt, answer, metadata (JSON) and task; `options` are size, seed and the options of the
      task. Every split has a different seed, so that training and test rows differ;
    - `file.py:function` or `package.module:function`, or the function itself, called with `options` as keyword arguments;
    - a list of these names: the rows of all;
    - rows, as a `datasets.Dataset`, a table of pandas or pyarrow, or any iterable of mappings, or a dictionary of them by
      `split` (`datasets.DatasetDict`);
    - a stream: a `datasets.IterableDataset`, an iterator, or any other iterable of mappings without a length.

    Values are Python's, as `plain` returns them. Cells of CSV are text, values in JSON keep JSON's types.

    Args:
        split: a split of the source or a part of it (`train[:100]`, see `Splits`). A source without splits is the split `train`
            or `test` if it is a file, and has any name if it is in memory.
        stream_rows: called only if the source is a stream: how many rows to read at most; None: all.
        encoding: of files of text.
        column_types: columns whose values are changed to another type, see `with_types`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything else; the message says what to do.
    """
    reading = _Reading(
        split=split,
        subset=subset,
        options=dict(options or {}),
        stream_rows=stream_rows,
        encoding=encoding,
        column_types=column_types or {},
    )
    if callable(source):
        return reading.function_rows(source, text_of(source))
    names = [source] if isinstance(source, Named) else source
    if not isinstance(names, Sequence) or not names or not all(isinstance(one, Named) for one in names):
        return reading.object_rows(source, "the data set")
    names = [str(one) for one in names]
    if not all(name.strip() for name in names):
        raise ValueError("the name of a data set is empty")
    if options and not takes_options(names):
        raise ValueError(
            f"data.options ({', '.join(options)}) are for reasoning_gym tasks and functions only: remove them for "
            f"{', '.join(names)}"
        )
    return reading.joined_rows(names) if len(names) > 1 else reading.named_rows(names[0])


def is_stream(source: DataSource) -> TypeGuard[Rows]:
    """Whether the source has no length."""
    return isinstance(source, Iterable) and not isinstance(source, Sized)


def take_rows(stream: Rows, limit: int | None) -> list[Mapping[str, Any]]:
    """The first `limit` rows of a stream; None: all. Reads no further."""
    if isinstance(stream, datasets.IterableDataset):
        return [unpadded(row, stream.features) for row in itertools.islice(stream.with_format(None), limit)]
    return list(itertools.islice(stream, limit))


def takes_options(source: DataSource) -> bool:
    """Whether `options` are for this source: a function or a task, or a list that has one."""
    names = [source] if isinstance(source, Named) else source if isinstance(source, Sequence) else []
    of_names = any(isinstance(one, Named) and ":" in (name := str(one)) and not names_files(name) for one in names)
    return callable(source) or of_names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The arguments of `load_rows`, which it describes."""

    split: str
    subset: str | None
    options: dict[str, Any]
    stream_rows: Callable[[], int | None]
    encoding: str
    column_types: Mapping[str, ColumnType]

    def named_rows(self, source: str) -> list[Row]:
        """The rows of a source by name."""
        if source.startswith(_REASONING_GYM):
            return self._selected(Splits(source, None, lambda name: self._gym_rows(source, name)))
        if not names_files(source):
            if ":" in source:
                return self.function_rows(load_object(source), source)
            return self._selected(hub_splits(source, subset=self.subset, read=self._read))
        if os.path.isdir(expanduser(source)):
            return self._selected(folder_splits(source, subset=self.subset, read=self._read))
        return self._selected(one_split(source, lambda: self._file_rows(source)))

    def joined_rows(self, sources: Sequence[str]) -> list[Row]:
        """The rows of several sources by name, of which `split` is a part."""
        if all(names_files(source) and not os.path.isdir(expanduser(source)) for source in sources):
            return self._selected(one_split("the list of files", lambda: list(_chained(map(self._file_rows, sources)))))

        def load(name: str) -> Part:
            whole = replace(self, split=name)
            return list(_chained(map(whole.named_rows, sources)))

        return self._selected(Splits("the list of sources", None, load))

    def function_rows(self, function: object, name: str) -> list[Row]:
        """The rows that a function returns, or an object that is rows already."""
        if not callable(function):
            return self.object_rows(function, name)
        try:
            inspect.signature(function).bind(**self.options)
        except TypeError as error:
            named = ", ".join(self.options)
            raise ValueError(f"{name} cannot be called with the data options ({named}): {error}") from error
        try:
            return self.object_rows(function(**self.options), name)
        except (KeyboardInterrupt, ValueError, FileNotFoundError):
            raise
        except BaseException as error:  # a user's function may raise anything, and call sys.exit()
            if is_interruption(error):
                raise
            raise ValueError(f"{name} failed: {describe(error)}") from error

    def object_rows(self, rows: Any, source: str) -> list[Row]:
        """The rows of an object in memory, or of the split of one that has splits."""
        if isinstance(rows, datasets.Dataset | datasets.DatasetDict):
            return self._selected(splits_of(rows, source))
        if isinstance(rows, datasets.IterableDatasetDict):
            by_name = {str(name): one for name, one in rows.items()}
            if self.split not in by_name:
                raise ValueError(f"{source} has no split {self.split!r} (splits: {', '.join(by_name)})")
            rows = by_name[self.split]
        if isinstance(rows, pandas.DataFrame | pyarrow.Table):
            rows = frame_rows(rows, source) if isinstance(rows, pandas.DataFrame) else table_rows(rows)
        if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
            raise ValueError(f"{source} returned {type(rows).__name__}: it must return rows, each a mapping of column to value")
        if is_stream(rows):
            if is_partial(self.split):
                raise ValueError(f"{source} has no length, so the split {self.split!r} has no meaning: limit the data itself")
            rows = take_rows(rows, self.stream_rows())
        made = _checked(list(rows), source)
        return self._selected(Splits(source, None, lambda name: typed_rows(made, self.column_types, source=source)))

    def _selected(self, splits: Splits) -> list[Row]:
        """The rows of `split`."""
        rows: list[Row] = []
        for part in splits.select(self.split):
            if isinstance(part, datasets.Dataset):
                part = typed_rows(table_rows(part), self.column_types, source=splits.source)
            rows += part
        if not rows:
            of_split = f" in its split {self.split!r}" if is_partial(self.split) else ""
            raise ValueError(f"{splits.source} has no rows{of_split}")
        return rows

    def _file_rows(self, name: str) -> list[Row]:
        return list(_chained(self._read(file, file, None) for file in find_files(name)))

    def _read(self, file: str, name: str, format: str | None) -> list[Row]:
        return read_file(file, encoding=self.encoding, column_types=self.column_types, name=name, format=format)

    def _gym_rows(self, source: str, split: str) -> list[Row]:
        rows = gym_rows(source.removeprefix(_REASONING_GYM), split=split, options=self.options)
        return typed_rows(rows, self.column_types, source=source)


_chained = itertools.chain.from_iterable


def _checked(rows: list[Any], source: str) -> list[Row]:
    """Rows with plain values. Raises ValueError if one is no mapping."""
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} of {source} is a {type(row).__name__}: it must map columns to values")
    return plain_rows(map(unpadded_arrays, rows))
