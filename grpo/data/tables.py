"""Rows of tables: of data sets, Arrow and pandas. Typed values stay what they are, in plain Python.

    table_rows(datasets.Dataset.from_dict({"prompt": ["a"], "answer": [7]}))       # [{"prompt": "a", "answer": 7}]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pandas
import pyarrow

from ..common.errors import first_line
from .padding import unpadded, unpadded_arrays
from .values import Row, plain, plain_rows

_FEATURES = b"huggingface"
"""Key in the metadata of a table: its columns as `datasets` has written them."""


def table_rows(table: datasets.Dataset | pyarrow.Table) -> list[Row]:
    """All rows, with values as `plain` returns them.

    The format of a data set (such as "numpy") has no effect, except for its selection of columns; a function that was set with
    `set_transform` is applied.

    Raises:
        ValueError: a value that Python or a decoder cannot represent, or a column that occurs twice.
    """
    try:
        rows = _by_row(_columns(table) if isinstance(table, datasets.Dataset) else _arrow_columns(table))
    except (ImportError, OverflowError) as error:  # a decoder of images or sound that is not installed; a date beyond Python's
        raise ValueError(first_line(error)) from error
    except KeyError as error:  # of pyarrow, for a map in which a key occurs twice
        raise ValueError(str(error.args[0])) from error
    features = _features(table)
    return [unpadded(row, features) for row in rows]


def _features(table: datasets.Dataset | pyarrow.Table) -> datasets.Features | None:
    """Those that `datasets` has given to the columns; None if it has written none into a table of Arrow."""
    if isinstance(table, datasets.Dataset):
        return table.features
    return datasets.Features.from_arrow_schema(table.schema) if _FEATURES in (table.schema.metadata or {}) else None


def _arrow_columns(table: pyarrow.Table) -> Mapping[str, Sequence[Any]]:
    names = table.column_names
    if len(set(names)) < len(names):
        raise ValueError(f"the column {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    if _FEATURES in (table.schema.metadata or {}):
        return _columns(datasets.Dataset(table))
    return table.to_pydict(maps_as_pydicts="strict")


def frame_rows(frame: pandas.DataFrame, source: str) -> list[Row]:
    """The rows of a table of pandas without its index; what pandas counts as missing is None.

    Raises:
        ValueError: a column that occurs twice.
    """
    if not frame.columns.is_unique:
        raise ValueError(f"{source} has a column twice: {', '.join(map(str, frame.columns[frame.columns.duplicated()]))}")
    return plain_rows(map(unpadded_arrays, frame.astype(object).where(frame.notna(), None).to_dict("records")))


def _columns(table: datasets.Dataset) -> Mapping[str, Sequence[Any]]:
    """The values of every column; decoding by columns is faster than by rows."""
    format = table.format
    if format["type"] == "custom":
        return table[:]
    columns = None if format["output_all_columns"] else format["columns"]
    return table.with_format(None, columns=columns)[:]


def _by_row(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    values = [[plain(value) for value in column] for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
