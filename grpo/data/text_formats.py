"""Rows in text: JSON, CSV, and lines. Each row is read by itself, so its values do not depend on other rows.

    list(json_rows('{"prompt": "a", "answer": "007"}\\n{"prompt": "b", "answer": 7}'))      # lines 1 and 2, and their rows
    list(csv_rows("prompt,answer\\na,007\\n"))                              # line 2: {"prompt": "a", "answer": "007"}

Every function yields the number of the line on which a row starts, from 1, and the row.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from .values import Row, json_decoder

_BLANK = re.compile("[ \t\r\n\ufeff]*")  # JSON's white space, and byte-order marks of files that were joined


class LineError(ValueError):
    """Text that cannot be read; `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


# -------------------------------------------------------------------------------------------------------------- JSON


def json_rows(text: str) -> Iterator[tuple[int, Row]]:
    """The rows of JSON Lines, of a list of objects, or of one object.

    Objects may span lines. If the whole text is one object whose only field is a list of rows, these are the rows; if all its
    fields are lists of one length, they are columns. An object with a conversation among its fields is a row.

    Raises:
        LineError: no JSON, a key that occurs twice in an object, or a row that is no object.
    """
    values = list(_json_values(text))
    if len(values) == 1 and not text.lstrip("\ufeff \t\r\n").startswith("["):
        line, value = values[0]
        values = [(line, row) for row in _rows_of_object(value)]
    for line, value in values:
        if not isinstance(value, dict):
            raise LineError(line, f"a row must be a JSON object, not {_json_type(value)}")
        yield line, value


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """The values of a text, or of the list that the text is, each with its line."""
    decoder = json_decoder()
    at, line, counted = _skip_blank(text, 0), 1, 0
    is_list = text.startswith("[", at)
    if is_list:
        at = _skip_blank(text, at + 1)
    for number in itertools.count():
        line, counted = line + text.count("\n", counted, at), at
        if is_list and text.startswith("]", at):
            if _skip_blank(text, at + 1) < len(text):
                raise LineError(line, "there is more text after the end of the list")
            return
        if at == len(text):
            if is_list:
                raise LineError(line, "the list has no end: is the file complete?")
            return
        if is_list and number > 0:
            if not text.startswith(",", at):
                raise LineError(line, "no comma between two rows of the list")
            at = _skip_blank(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
        value, end = _decode(decoder, text, at, line)
        yield line, value
        at = _skip_blank(text, end)


def _decode(decoder: json.JSONDecoder, text: str, at: int, line: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == line else f"line {error.lineno}, column {error.colno}"
        reason = f"no JSON: {error.msg.removesuffix(' at')} ({where})"
        is_at_end = error.msg.startswith("Unterminated string") or not text[error.pos :].strip()
        raise LineError(line, f"{reason}: is the file complete?" if is_at_end else reason) from error
    except RecursionError:
        raise LineError(line, "JSON is nested too deeply") from None
    except ValueError as error:  # a key that occurs twice, or a number that Python cannot represent
        raise LineError(line, str(error)) from error


def _skip_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _rows_of_object(value: Any) -> list[Any]:
    """The rows that an object holds, or the object itself."""
    fields = list(value.values()) if isinstance(value, dict) else []
    if not fields or not all(isinstance(field, list) for field in fields) or any(map(_is_conversation, fields)):
        return [value]
    if len(fields) == 1 and all(isinstance(item, dict) for item in fields[0]):
        return fields[0]
    if len({len(field) for field in fields}) > 1:
        return [value]
    return [dict(zip(value, items, strict=True)) for items in zip(*fields, strict=True)]


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(message, dict) and "role" in message for message in value)


def _json_type(value: object) -> str:
    names = {str: "a text", bool: "a boolean", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return names.get(type(value), type(value).__name__)


# --------------------------------------------------------------------------------------------------------------- CSV


def csv_rows(text: str, delimiter: str | None = None) -> Iterator[tuple[int, Row]]:
    """The rows of CSV with a header: every cell is text, and an empty one None. Blank lines are skipped.

    Without `delimiter` it is a comma; a semicolon or a tab if no comma divides the header. A column without a name is
    called `Unnamed: <index>`, as in pandas.

    Raises:
        LineError: a row has more or fewer cells than the header, a column occurs twice, or a quoted cell has no end.
    """
    with _any_field_size():
        lines = list(_csv_cells(text, delimiter or _delimiter(text)))
    header_line, header = lines[0] if lines else (1, [])
    names = [name or f"Unnamed: {index}" for index, name in enumerate(header)]
    for name in names:
        if names.count(name) > 1:
            raise LineError(header_line, f"the header has the column {name!r} twice")
    for line, cells in lines[1:]:
        if len(cells) != len(names):
            raise LineError(line, f"the row has {len(cells)} cells, and the header {len(names)}")
        yield line, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _csv_cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not blank, with its first line."""
    # A lone \r ends a row only where no \n does; elsewhere it is in a quoted cell, or a mistake that the reader refuses.
    lines = io.StringIO(text, newline="\n" if "\n" in text else "")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reasons = {"unexpected end": "a quoted cell has no end", "new-line char": "a cell with a line break needs quotes"}
            reason = next((ours for start, ours in reasons.items() if str(error).startswith(start)), str(error))
            raise LineError(line, reason) from error
        if cells is None:
            return
        if cells:
            yield line, cells


def _delimiter(text: str) -> str:
    """The first one that divides the header, which may have quotes."""
    for delimiter in ",;\t":
        with contextlib.suppress(LineError):
            _, header = next(_csv_cells(text, delimiter), (1, []))
            if len(header) > 1:
                return delimiter
    return ","


@contextlib.contextmanager
def _any_field_size() -> Iterator[None]:
    """The module's limit of 128 KiB for a cell is one setting of the process: set it and restore it."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# -------------------------------------------------------------------------------------------------------------- text


def text_rows(text: str) -> Iterator[tuple[int, Row]]:
    """A row with the column `text` for each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"text": line.removesuffix("\r")}
