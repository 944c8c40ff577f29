"""Arrow's padding does not reach the prompt, whatever the depth, and values of formats without padding stay."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.data.messages import read_prompt
from rankup.grpo.data.padding import unpadded
from rankup.grpo.data.sources import load_rows, take_rows


def talk(arguments: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "user", "content": "?", **more}, {"role": "assistant", "content": None, "tool_calls": [call]}]


ROWS = [
    {"prompt": talk({"city": "Oslo"}), "tools": [{"type": "function", "function": {"name": "weather"}}], "facts": {"x": 1}},
    {"prompt": talk({"a": {"b": [{"c": 1}, {"d": 2}]}}, name="Kim"), "tools": [{"type": "code"}], "facts": {"y": 2}},
]
PADDED_FACTS = [{"x": 1, "y": None}, {"x": None, "y": 2}]


def parquet_of(rows: list[dict[str, Any]], path: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "Dataset", "stream"])
def test_padding_is_removed_at_any_depth_from_conversations_and_tools_only(tmp_path: Path, kind: str):
    table = datasets.Dataset.from_list(ROWS)
    source: Any = {"parquet": parquet_of(ROWS, tmp_path / "rows.parquet"), "Dataset": table}.get(kind)
    rows = take_rows(table.to_iterable_dataset(), None) if kind == "stream" else load_rows(source, split="train")
    assert [read_prompt(row["prompt"]) for row in rows] == [row["prompt"] for row in ROWS]
    assert [row["tools"] for row in rows] == [row["tools"] for row in ROWS]
    assert [row["facts"] for row in rows] == PADDED_FACTS, "columns of reward functions are as the table has them"


def test_what_pandas_has_read_from_a_typed_table_has_no_padding(tmp_path: Path):
    rows = pandas.read_parquet(parquet_of(ROWS, tmp_path / "rows.parquet")).to_dict("records")
    rows = [{**row, "scalar": np.float64(0.5), "none": np.array(None), "table": np.zeros((2, 2))} for row in rows]
    loaded = load_rows(rows, split="train")  # type: ignore[arg-type]
    assert [read_prompt(row["prompt"]) for row in loaded] == [row["prompt"] for row in ROWS]
    assert [row["tools"] for row in loaded] == [row["tools"] for row in ROWS]


def test_a_null_that_json_has_in_arguments_stays(tmp_path: Path):
    rows = [{"prompt": talk({"city": "Oslo", "unit": None})}, {"prompt": talk({"a": 1})}]
    assert [read_prompt(row["prompt"]) for row in load_rows(rows, split="train")] == [row["prompt"] for row in rows]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json", features=datasets.Features(
        {"prompt": datasets.List(datasets.Json())}
    ))  # fmt: skip
    assert [read_prompt(row["prompt"]) for row in load_rows(table, split="train")] == [row["prompt"] for row in rows]


VALUES = st.text() | st.integers(-9, 9) | st.booleans()
INNER = st.dictionaries(st.sampled_from("xyz"), VALUES, min_size=1)
ARGUMENTS = st.dictionaries(st.sampled_from("abcd"), VALUES | INNER, min_size=1)


@given(st.lists(ARGUMENTS, min_size=1, max_size=4))
def test_arguments_survive_a_table(arguments: list[dict[str, Any]]):
    """One type for each key, as a table needs it: values as JSON text in a mapping of keys."""
    typed = [{key: one if isinstance(one, dict) else {"value": one} for key, one in row.items()} for row in arguments]
    texts = [{key: {name: json.dumps(one) for name, one in inner.items()} for key, inner in row.items()} for row in typed]
    rows = [{"prompt": talk(row)} for row in texts]
    table = datasets.Dataset.from_list(rows)
    assert [read_prompt(unpadded(row, table.features)["prompt"]) for row in map(dict, table)] == [row["prompt"] for row in rows]
