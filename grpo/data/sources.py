"""Where rows come from: files, the Hub, Reasoning Gym tasks, functions, rows in memory, or streams.

    rows = load_rows("data/train.jsonl", split="train")
    rows = load_rows(endless_generator(), split="train", stream_rows=lambda: 800)       # the first 800

A stream is a source without a length: an iterator, a generator, a `datasets.IterableDataset`. It may be infinite.
"""

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeGuard

import datasets
import huggingface_hub.utils
from datasets.exceptions import DatasetsError

from ...rewards.loading import find_file, load_object
from ..common.errors import first_line
from ..config.functions import text_of
from ..config.paths import DATA_FORMATS
from .padding import unpadded, unpadded_arrays

Rows = Iterable[Mapping[str, Any]]

DataSource = (
    str
    | datasets.Dataset
    | datasets.IterableDataset
    | datasets.DatasetDict
    | datasets.IterableDatasetDict
    | Rows
    | Callable[..., Rows]
)
"""A source of rows by name, a data set, rows in memory, a stream, or a function that returns them; see `load_rows`."""

EvalSource = DataSource | Mapping[str, DataSource]
"""One data set for evaluation, or several by name. A dictionary of splits is several data sets."""

_REASONING_GYM = "reasoning_gym:"
_DEFAULT_SEED = 42
_SILENT = logging.CRITICAL + 1


def load_rows(
    source: DataSource,
    *,
    split: str,
    subset: str | None = None,
    options: Mapping[str, Any] | None = None,
    stream_rows: Callable[[], int | None] = lambda: None,
) -> list[dict[str, Any]]:
    """Read all rows of a data set into memory, or the first ones of a stream. `source` is one of:

    - a path ending in .json, .jsonl, .parquet or .csv, relative to the working directory (files have no splits: all rows are
      read);
    - the id of a data set on the Hub (with `split`, and `subset` if it has several);
    - `reasoning_gym:<task>`: columns prompt, answer, metadata (JSON) and task; `options` are size, seed and the options of the
      task. Every split has a different seed, so that training and test rows differ;
    - `file.py:function` or `package.module:function`, or the function itself, called with `options` as keyword arguments;
    - rows, as a `datasets.Dataset` or any iterable of mappings, or a dictionary of them by `split` (`datasets.DatasetDict`);
    - a stream: a `datasets.IterableDataset`, an iterator, or any other iterable of mappings without a length.

    Args:
        stream_rows: called only if the source is a stream: how many rows to read at most; None: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything else; the message says what to do.
    """
    options = dict(options or {})
    if callable(source):
        return _function_rows(source, name=text_of(source), split=split, options=options, stream_rows=stream_rows)
    if not isinstance(source, str):
        return _as_rows(source, source="the data set", split=split, stream_rows=stream_rows)
    if source.startswith(_REASONING_GYM):
        return _reasoning_gym_rows(source.removeprefix(_REASONING_GYM), split=split, options=options)
    if ":" in source:
        return _function_rows(load_object(source), name=source, split=split, options=options, stream_rows=stream_rows)
    if options:
        raise ValueError(
            f"data.options ({', '.join(options)}) are for reasoning_gym tasks and functions only: remove them for {source!r}"
        )
    if Path(source).suffix in DATA_FORMATS:
        return _file_rows(find_file(source))
    return _hub_rows(source, split=split, subset=subset)


def is_stream(source: DataSource) -> TypeGuard[Rows]:
    """Whether the source has no length."""
    return isinstance(source, Iterable) and not isinstance(source, Sized)


def take_rows(stream: Rows, limit: int | None) -> list[Mapping[str, Any]]:
    """The first `limit` rows of a stream; None: all. Reads no further."""
    if isinstance(stream, datasets.IterableDataset):
        return [unpadded(row, stream.features) for row in itertools.islice(stream.with_format(None), limit)]
    return list(itertools.islice(stream, limit))


def _file_rows(path: Path) -> list[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.load_dataset(
                DATA_FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except (DatasetsError, ValueError) as error:
            if "corresponds to no data" in str(error):
                raise ValueError(f"{path} has no rows") from error
            raise ValueError(f"cannot read {path}: {first_line(error.__cause__ or error)}") from error
        return _as_rows(loaded, source=str(path), split="train")


def _hub_rows(source: str, *, split: str, subset: str | None) -> list[dict[str, Any]]:
    with _quiet_datasets():
        try:
            loaded = datasets.load_dataset(source, subset, split=split)
        except ConnectionError as error:
            raise ValueError(
                f"cannot reach the Hub for data set {source!r}, and it is not in the local cache: go online once, or "
                f"name a file ({', '.join(DATA_FORMATS)})"
            ) from error
        except (DatasetsError, OSError, ValueError) as error:
            raise ValueError(f"cannot load data set {source!r}: {first_line(error)}") from error
        return _as_rows(loaded, source=source, split=split)


def _function_rows(
    function: object, *, name: str, split: str, options: dict[str, Any], stream_rows: Callable[[], int | None]
) -> list[dict[str, Any]]:
    """The rows that a function returns, or an object that is rows already."""
    if not callable(function):
        return _as_rows(function, source=name, split=split, stream_rows=stream_rows)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{name} cannot be called with the data options ({', '.join(options)}): {error}") from error
    return _as_rows(function(**options), source=name, split=split, stream_rows=stream_rows)


def _reasoning_gym_rows(task: str, *, split: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    from reasoning_gym.factory import DATASETS, create_dataset  # imported here since it takes seconds

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        offer = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"reasoning_gym has no task {task!r}{offer}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"reasoning_gym:{task} has no option {unknown[0]!r} (options: {', '.join(known)})")
    seed = options.get("seed", _DEFAULT_SEED)
    # Row i of a task depends on seed + i, so a split that started at seed + 1 would repeat almost all rows of another: the
    # seeds of splits are far apart.
    offset = 0 if split == "train" else zlib.crc32(split.encode()) % 2**30
    try:
        made = create_dataset(task, **{**options, "seed": seed + offset})
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task}: invalid options: {first_line(error)}") from error
    return [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "metadata": json.dumps(entry["metadata"], default=str),
            "task": task,
        }
        for entry in (made[index] for index in range(len(made)))
    ]


def _as_rows(
    rows: Any, *, source: str, split: str, stream_rows: Callable[[], int | None] = lambda: None
) -> list[dict[str, Any]]:
    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in rows:
            raise ValueError(f"{source} has no split {split!r} (splits: {', '.join(map(str, rows))})")
        rows = rows[split]
    if isinstance(rows, datasets.Dataset):
        columns: dict[str, list[Any]] = rows.with_format(None)[:]  # decodes once per column instead of once per row
        features = rows.features
        rows = [unpadded(dict(zip(columns, values, strict=True)), features) for values in zip(*columns.values(), strict=True)]
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        raise ValueError(f"{source} returned {type(rows).__name__}: it must return rows, each a mapping of column to value")
    rows = take_rows(rows, stream_rows()) if is_stream(rows) else list(rows)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} of {source} is a {type(row).__name__}: it must map columns to values")
    if not rows:
        raise ValueError(f"{source} has no rows")
    return [unpadded_arrays(row) for row in rows]


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Turn off progress bars and warnings of both libraries inside the block; errors are still raised."""
    with contextlib.ExitStack() as restore:
        for bars in (datasets.utils, huggingface_hub.utils):
            if not bars.are_progress_bars_disabled():
                restore.callback(bars.enable_progress_bars)
                bars.disable_progress_bars()
        for loggers in (datasets.utils.logging, huggingface_hub.utils.logging):
            restore.callback(loggers.set_verbosity, loggers.get_verbosity())
            loggers.set_verbosity(_SILENT)
        yield
