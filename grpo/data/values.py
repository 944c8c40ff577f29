"""Values of rows as plain Python: what reward functions get, and what a run records.

    plain(numpy.float64(0.5)), plain(datetime.date(2024, 1, 1))        # 0.5, "2024-01-01"
    with_types({"answer": "7"}, {"answer": "int"})                     # {"answer": 7}
"""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas
from pydantic import TypeAdapter, ValidationError

from ..config.data import ColumnType

Row = dict[str, Any]

_UNCHANGED = frozenset({str, int, float, bool, type(None), bytes})
_ADAPTERS = {"int": TypeAdapter(int), "float": TypeAdapter(float), "bool": TypeAdapter(bool)}


def plain_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows as dictionaries of plain values.

    Raises:
        ValueError: a list or mapping contains itself, with the number of the row.
    """
    made: list[Row] = []
    for row in rows:
        try:
            made.append({name: plain(value) for name, value in row.items()})
        except RecursionError:
            raise ValueError(f"row {len(made)}: a value contains itself, or is nested too deeply") from None
    return made


def plain(value: Any) -> Any:
    """`value` in Python's types.

    Dates, times, time stamps and durations become ISO 8601 text, UUIDs text. Scalars and arrays of numpy, pandas and torch
    become Python's scalars and lists, tuples become lists, pandas' `NA` and `NaT` become None. Texts, numbers, booleans, None,
    bytes, decimals, and objects of any other type are unchanged.
    """
    kind = type(value)
    if kind in _UNCHANGED:
        return value
    if kind is dict or isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is pandas.NA or value is pandas.NaT:
        return None
    if isinstance(value, datetime.timedelta):
        return pandas.Timedelta(value).isoformat()
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, np.datetime64 | np.timedelta64):
        text = str(value) if isinstance(value, np.datetime64) else pandas.Timedelta(value).isoformat()
        return None if np.isnat(value) else text
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "mM":  # `tolist` would lose the unit
        return [plain(one) for one in value] if value.ndim else plain(value[()])
    if isinstance(value, np.str_):
        return str(value)
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def with_types(row: Row, types: Mapping[str, ColumnType]) -> Row:
    """The row with the values of some columns in another type. None stays None.

    Raises:
        ValueError: a value is not of this type, with the name of the column.
    """
    if not types:
        return row
    changed = dict(row)
    for name, kind in types.items():
        if row.get(name) is None:
            continue
        try:
            changed[name] = _with_type(row[name], kind)
        except (TypeError, ValueError, RecursionError) as error:  # bytes, for one, are no JSON
            raise ValueError(f"column {name!r}: {_shown(row[name])} is no {kind} (data.column_types)") from error
    return changed


def check_column_types(rows: Iterable[Row], types: Mapping[str, ColumnType]) -> None:
    """Raise a ValueError if `data.column_types` names a column that no row has."""
    columns = dict.fromkeys(name for row in rows for name in row) if types else {}
    for name in types:
        if name not in columns:
            raise ValueError(f"data.column_types: no column {name!r} (columns: {', '.join(columns)})")


def _with_type(value: Any, kind: ColumnType) -> Any:
    if kind == "str":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if kind == "json":
        return json_decoder().decode(value) if isinstance(value, str) else value
    try:
        return _ADAPTERS[kind].validate_python(value)
    except ValidationError as error:
        raise ValueError(str(error)) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def json_decoder() -> json.JSONDecoder:
    """A decoder that refuses what it could not return as it is written: a key that occurs twice, a number beyond all floats."""
    return json.JSONDecoder(object_pairs_hook=_object, parse_float=_float)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # not the token Infinity, which Python writes
        raise ValueError(f"the number {text} is larger than any float")
    return value
