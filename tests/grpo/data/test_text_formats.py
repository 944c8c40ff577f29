"""JSON, CSV and text as they are written: every row by itself, and mistakes by line."""

from __future__ import annotations

import csv
import io
import json
import math
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.data.text_formats import LineError, csv_rows, json_rows, text_rows

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=4), min_size=2, max_size=6)


def from_json(text: str) -> list[dict[str, Any]]:
    return [row for _, row in json_rows(text)]


def from_csv(text: str, delimiter: str | None = None) -> list[dict[str, Any]]:
    return [row for _, row in csv_rows(text, delimiter)]


def same(a: object, b: object) -> bool:
    """Equal, and of the same types at every depth."""
    return repr(a) == repr(b)


def mistake(read: Any, text: str) -> tuple[int, str]:
    with pytest.raises(LineError) as caught:
        list(read(text))
    return caught.value.line, str(caught.value)


# ------------------------------------------------------------------------------------------ JSON


def test_values_keep_the_types_of_json_whatever_other_rows_hold():
    rows = [
        {"answer": "2024-01-01", "n": 7},
        {"answer": "12.50", "n": 7.0},
        {"answer": "007", "n": "7"},
        {"answer": "true", "n": True},
        {"answer": "[1, 2]", "n": [1, 2.0, "3"]},
        {"answer": None, "n": {"a": {}}, "other": 2**70},
        {"answer": "", "n": -0.0},
    ]
    assert same(from_json("\n".join(map(json.dumps, rows))), rows)


@given(ROWS)
def test_rows_written_as_lines_or_as_a_list_come_back(rows: list[dict[str, Any]]):
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        for text in ("\n".join(lines), "\r\n".join(lines) + "\r\n", "\ufeff" + "\n\n".join(lines), f"[{', '.join(lines)}]"):
            assert same(from_json(text), rows)
        pretty = [json.dumps(row, ensure_ascii=ascii_only, indent=1) for row in rows]
        assert same(from_json("\n".join(pretty)), rows)
        assert same(from_json(json.dumps(rows, ensure_ascii=ascii_only, indent=2)), rows)


def test_line_separators_inside_a_text_do_not_end_a_row():
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    assert from_json(json.dumps({"a": text}, ensure_ascii=False) + '\n{"a": "next"}') == [{"a": text}, {"a": "next"}]


def test_python_s_tokens_for_numbers_that_json_does_not_have_are_read():
    (row,) = from_json('{"a": NaN, "b": Infinity, "c": -Infinity}')
    assert math.isnan(row["a"]) and (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"prompt": "a", "tests": [{"i": 1}]}', [{"prompt": "a", "tests": [{"i": 1}]}]),
        ('{\n"data": [\n{"prompt": "a"},\n{"prompt": "b"}]}', [{"prompt": "a"}, {"prompt": "b"}]),
        ('{"prompt": ["a", "b"], "n": [1, "2"]}', [{"prompt": "a", "n": 1}, {"prompt": "b", "n": "2"}]),
        ('{"prompt": [[{"role": "user"}], [{"role": "system"}]]}', [{"prompt": [{"role": r}]} for r in ("user", "system")]),
        ('{"prompt": [{"role": "user", "content": "x"}]}', [{"prompt": [{"role": "user", "content": "x"}]}]),
        ('{"prompt": [{"role": "user"}], "tags": ["x"]}', [{"prompt": [{"role": "user"}], "tags": ["x"]}]),
        ('{"a": ["x"], "n": [1, 2]}', [{"a": ["x"], "n": [1, 2]}]),
        ('{"a": [1]}\n{"a": [2]}', [{"a": [1]}, {"a": [2]}]),
        ("{}", [{}]),
    ],
)
def test_one_object_is_a_row_or_holds_the_rows(text: str, rows: list[dict[str, Any]]):
    assert from_json(text) == rows


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1}\n\n{"a": 2', 3, "no JSON: Expecting ',' delimiter (column 8): is the file complete?"),
        ('{"a": 1}\n{"a": "text', 2, "no JSON: Unterminated string starting (column 7): is the file complete?"),
        ('{"a": 1}\n{"a": "x\n{"a": 2}', 2, "no JSON: Invalid control character (column 9)"),
        ('{"a": 1}\n{"a":\n2', 2, "no JSON: Expecting ',' delimiter (line 3, column 2): is the file complete?"),
        ('{"a": 1},\n{"a": 2}', 1, "no JSON: Expecting value (column 9)"),
        ("{'a': 1}", 1, "no JSON: Expecting property name enclosed in double quotes (column 2)"),
        ('{"a": 1}\n7', 2, "a row must be a JSON object, not a number"),
        ('[{"a": 1},\n"text"]', 2, "a row must be a JSON object, not a text"),
        ("null", 1, "a row must be a JSON object, not null"),
        ('[{"a": 1},\n{"a": 2}\n', 3, "the list has no end: is the file complete?"),
        ('[{"a": 1}\n{"a": 2}]', 2, "no comma between two rows of the list"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, "there is more text after the end of the list"),
        ('{"a": 1}\n{"b": {"x": 1, "x": 2}}', 2, "the key 'x' occurs twice in one object"),
        ('\n\n{"a": 1e999}', 3, "the number 1e999 is larger than any float"),
    ],
)
def test_mistakes_in_json_are_named_by_the_line_on_which_the_row_starts(text: str, line: int, reason: str):
    assert mistake(json_rows, text) == (line, reason)


def test_json_that_is_nested_too_deeply_is_a_mistake_of_its_line():
    assert mistake(json_rows, f'{{"a": 1}}\n{{"a": {"[" * 100_000}}}') == (2, "JSON is nested too deeply")


# ------------------------------------------------------------------------------------------ CSV


def test_cells_are_text_and_empty_ones_none():
    text = 'prompt,answer,n\n"a, ""b""\nc",007,1.50\nx,,true\nnull,NA,2024-01-01\n'
    assert from_csv(text) == [
        {"prompt": 'a, "b"\nc', "answer": "007", "n": "1.50"},
        {"prompt": "x", "answer": None, "n": "true"},
        {"prompt": "null", "answer": "NA", "n": "2024-01-01"},
    ]


@given(
    st.lists(st.text(string.ascii_letters + " _;\t\"'", min_size=1, max_size=6), min_size=2, max_size=4, unique=True),
    st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=4, max_size=4), min_size=1),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
)
def test_tables_written_by_python_come_back(names: list[str], cells: list[list[str]], delimiter: str, end: str):
    file = io.StringIO(newline="")
    has_return = any("\r" in cell for row in cells for cell in row)  # Python does not always quote it
    quoting = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([names, *([*row][: len(names)] for row in cells)])
    expected = [{name: cell or None for name, cell in zip(names, row, strict=False)} for row in cells]
    assert from_csv(file.getvalue(), delimiter) == expected


def test_a_header_without_commas_may_be_separated_by_semicolons_or_tabs():
    assert from_csv("prompt;answer\na;3,5\n") == [{"prompt": "a", "answer": "3,5"}]
    assert from_csv("prompt\tanswer\na\tb, c\n") == [{"prompt": "a", "answer": "b, c"}]
    assert from_csv("prompt;x,answer\na,b\n") == [{"prompt;x": "a", "answer": "b"}]
    assert from_csv("prompt\na;b\n") == [{"prompt": "a;b"}]
    assert from_csv('"a, b";"c"\n"1";"2"\n') == [{"a, b": "1", "c": "2"}]
    assert from_csv('"a;b"\n1\n') == [{"a;b": "1"}]


def test_long_cells_blank_lines_nul_bytes_and_columns_without_a_name():
    limit = csv.field_size_limit()
    assert from_csv("a,b\n\n" + "x" * 300_000 + ",y\0z\n\n") == [{"a": "x" * 300_000, "b": "y\0z"}]
    assert csv.field_size_limit() == limit
    assert from_csv(",a\n0,x\n") == [{"Unnamed: 0": "0", "a": "x"}]
    assert from_csv("a,b\r1,2\r") == [{"a": "1", "b": "2"}]
    assert from_csv('a\n""\nx\n') == [{"a": None}, {"a": "x"}]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a,b\n1,2\n1\n", 3, "the row has 1 cells, and the header 2"),
        ('a,b\n"1\n2",3\n1,2,3\n', 4, "the row has 3 cells, and the header 2"),
        ("a,b,a\n1,2,3\n", 1, "the header has the column 'a' twice"),
        ('a,b\n1,2\n"1,2\n3,4\n', 3, "a quoted cell has no end"),
        ("a,b\nx\ry,2\n", 2, "a cell with a line break needs quotes"),
        ('a,b\n"1"x,2\n', 2, "',' expected after '\"'"),
    ],
)
def test_mistakes_in_csv_are_named_by_the_line_on_which_the_row_starts(text: str, line: int, reason: str):
    assert mistake(csv_rows, text) == (line, reason)


def test_lines_of_text():
    assert list(text_rows("one\r\n\n two\u2028x ")) == [(1, {"text": "one"}), (3, {"text": " two\u2028x "})]
