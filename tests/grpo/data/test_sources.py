"""Data sets without a length: only the rows that are asked for are read, also of an infinite one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from rankup.grpo.data.sources import load_rows, take_rows

ROWS = [{"prompt": f"count to {n}", "answer": n} for n in range(10)]


class Endless:
    """Rows without an end, and how many were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for n in itertools.count():
            self.taken += 1
            yield {"prompt": f"count to {n}", "answer": n}


def streamed(rows: Iterable[dict[str, Any]]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("make", [iter, lambda endless: endless, streamed])
def test_an_infinite_source_is_read_up_to_the_limit(make):
    endless = Endless()
    assert load_rows(make(endless), split="train", stream_rows=lambda: 7) == ROWS[:7]
    assert endless.taken == 7


def test_a_file_can_be_streamed(jsonl: Path):
    stream = datasets.load_dataset("json", data_files=str(jsonl), split="train", streaming=True)
    assert load_rows(stream, split="train", stream_rows=lambda: 3) == ROWS[:3]
    assert load_rows(stream.with_format("numpy").shuffle(seed=1, buffer_size=2), split="train")[0].keys() == ROWS[0].keys()


def test_a_stream_gives_plain_values_whatever_its_format():
    (row, *_) = load_rows(streamed(ROWS).with_format("numpy"), split="train")
    assert row == ROWS[0] and type(row["answer"]) is int


def test_a_shorter_stream_and_one_without_a_limit_are_read_completely():
    assert load_rows(iter(ROWS), split="train", stream_rows=lambda: 100) == ROWS
    assert load_rows(streamed(ROWS), split="train") == ROWS
    assert take_rows((row for row in ROWS), None) == ROWS


def test_data_with_a_length_is_read_completely():
    def never() -> int:
        raise AssertionError("it has a length")

    table = datasets.Dataset.from_list(ROWS)
    for source in (ROWS, tuple(ROWS), table, datasets.DatasetDict({"a": table})):
        assert load_rows(source, split="a", stream_rows=never) == ROWS


def test_a_dictionary_of_streams_is_read_by_split():
    both = datasets.IterableDatasetDict({"train": streamed(Endless()), "test": streamed(ROWS)})
    assert load_rows(both, split="train", stream_rows=lambda: 2) == ROWS[:2]
    assert load_rows(both, split="test") == ROWS
    with pytest.raises(ValueError, match=r"the data set has no split 'dev' \(splits: train, test\)"):
        load_rows(both, split="dev")


def test_a_function_may_return_a_stream(tmp_path: Path):
    (tmp_path / "data.py").write_text(
        "import itertools\n"
        "def endless(start):\n"
        "    return ({'prompt': str(n)} for n in itertools.count(start))\n"
        "rows = endless(5)\n"
    )
    source = f"{tmp_path}/data.py:endless"
    rows = load_rows(source, split="train", options={"start": 3}, stream_rows=lambda: 2)
    assert rows == [{"prompt": "3"}, {"prompt": "4"}]
    assert load_rows(f"{tmp_path}/data.py:rows", split="train", stream_rows=lambda: 1) == [{"prompt": "5"}]


def test_a_stream_without_rows_and_one_of_texts_are_errors():
    with pytest.raises(ValueError, match="the data set has no rows"):
        load_rows(iter([]), split="train", stream_rows=lambda: 2)
    with pytest.raises(ValueError, match="row 0 of the data set is a str"):
        load_rows(itertools.repeat("text"), split="train", stream_rows=lambda: 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "reason"), [("raise KeyError('x')", "KeyError: 'x'"), ("sys.exit()", r"SystemExit: +\(sys.exit\(\) was called\)")]
)
@pytest.mark.parametrize("start", ["", "yield {'prompt': 'a'}"])
def test_a_function_of_data_that_fails_or_exits_is_an_error_with_its_name(tmp_path: Path, body: str, reason: str, start: str):
    file = tmp_path / "rows.py"
    file.write_text(f"import sys\n\ndef rows():\n    {start or 'pass'}\n    {body}\n")
    with pytest.raises(ValueError, match=f"rows.py:rows failed: {reason}"):
        load_rows(f"{file}:rows", split="train")


def test_a_map_with_a_key_twice_and_a_broken_archive_are_errors(tmp_path: Path):
    table = pyarrow.table({"a": pyarrow.array([[("k", 1), ("k", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))})
    with pytest.raises(ValueError, match="duplicate key was 'k'"):
        load_rows(table, split="train")
    (tmp_path / "rows.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cannot read .*rows\.tar\.gz: data files are"):
        load_rows(tmp_path / "rows.tar.gz", split="train")


def test_text_that_is_nested_too_deeply_is_no_json():
    with pytest.raises(ValueError, match=r"row 0 of the data set: column 'a': '\[\[.* is no json"):
        load_rows([{"a": "[" * 100_000}], split="train", column_types={"a": "json"})


@pytest.mark.parametrize("text", ['{"x": 1, "x": 2}', "[1e999]"])
def test_the_type_json_refuses_what_a_file_of_json_refuses(text: str):
    with pytest.raises(ValueError, match=r"row 0 of the data set: column 'a': .* is no json"):
        load_rows([{"a": text}], split="train", column_types={"a": "json"})
