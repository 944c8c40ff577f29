"""Values in memory: what arrives of tables, arrays and objects."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from decimal import Decimal
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from PIL import Image

from rankup.grpo.data.sources import load_rows
from rankup.grpo.data.values import plain


def load(source: Any) -> list[dict[str, Any]]:
    return load_rows(source, split="train")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.arange(3), [0, 1, 2]),
        (np.array([["a"], ["b"]]), [["a"], ["b"]]),
        (np.array([{"role": "user", "n": np.int8(1)}], object), [{"role": "user", "n": 1}]),
        (np.datetime64("2024-01-01"), "2024-01-01"),
        (np.array(["2024-01-01T00:00:00.123456789"], "datetime64[ns]"), ["2024-01-01T00:00:00.123456789"]),
        (np.datetime64("NaT"), None),
        (np.array(np.datetime64("2024-01-01T00:00:00.5", "ns")), "2024-01-01T00:00:00.500000000"),
        (np.array(7), 7),
        (np.timedelta64(90, "s"), "P0DT0H1M30S"),
        (pandas.Series([1, 2]), [1, 2]),
        (pandas.Timestamp("2024-01-01T02:03:04.123456789", tz="UTC"), "2024-01-01T02:03:04.123456789+00:00"),
        (pandas.NA, None),
        (pandas.NaT, None),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor(3), 3),
        (datetime.date(2024, 1, 1), "2024-01-01"),
        (datetime.datetime(2024, 1, 1, 2, 3), "2024-01-01T02:03:00"),
        (datetime.time(1, 2, 3), "01:02:03"),
        (datetime.timedelta(seconds=90), "P0DT0H1M30S"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ((1, (2, "3")), [1, [2, "3"]]),
        ({"a": {"b": np.int64(1), "c": (None,)}}, {"a": {"b": 1, "c": [None]}}),
        (2**70, 2**70),
        (b"\xff", b"\xff"),
        (Decimal("12.50"), Decimal("12.50")),
        (-0.0, -0.0),
    ],
)
def test_values_are_python_s(value: Any, expected: Any):
    (row,) = load([{"value": value}])
    assert repr(row["value"]) == repr(expected)


def test_numbers_that_are_not_finite_and_other_objects_are_unchanged():
    anything = object()
    assert math.isnan(plain(np.float64("nan"))) and plain(math.inf) == math.inf
    assert plain([anything]) == [anything] and plain({1: "a"}) == {1: "a"}


def test_a_value_that_contains_itself_is_refused_by_row():
    endless: list[Any] = []
    endless.append({"again": endless})
    with pytest.raises(ValueError, match="row 1: a value contains itself, or is nested too deeply"):
        load([{"value": 1}, {"value": endless}])


def test_a_table_of_pandas_is_read_with_none_for_what_is_missing():
    frame = pandas.DataFrame(
        {
            "prompt": ["a", "b"],
            "n": [1, 2],
            "x": [0.5, None],
            "text": ["007", None],
            "when": pandas.to_datetime(["2024-01-01", None]),
            "maybe": pandas.array([1, None], "Int64"),
            "list": [[1, 2], None],
        },
        index=[7, 7],
    )
    assert repr(load(frame)) == repr(
        [
            {"prompt": "a", "n": 1, "x": 0.5, "text": "007", "when": "2024-01-01T00:00:00", "maybe": 1, "list": [1, 2]},
            {"prompt": "b", "n": 2, "x": None, "text": None, "when": None, "maybe": None, "list": None},
        ]
    )
    with pytest.raises(ValueError, match="the data set has a column twice: a"):
        load(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


def test_a_data_set_gives_the_values_of_its_table():
    features = datasets.Features(
        prompt=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
        day=datasets.Value("date32"),
        parts=datasets.List({"a": datasets.Value("int64"), "b": datasets.Value("string")}),
    )
    rows = [{"prompt": "p", "label": 1, "day": datetime.date(2024, 1, 1), "parts": [{"a": 1, "b": None}]}]
    table = datasets.Dataset.from_list(rows, features=features)
    expected = [{**rows[0], "day": "2024-01-01"}]
    for source in (table, table.with_format("numpy"), table.with_format("torch"), table.to_iterable_dataset()):
        assert repr(load(source)) == repr(expected)
    assert load(table.with_format("numpy", columns=["label"])) == [{"label": 1}]
    assert load(table.with_format("numpy", columns=["label"], output_all_columns=True)) == expected


def test_a_transform_of_a_data_set_is_applied():
    table = datasets.Dataset.from_dict({"question": ["a", "b"]})
    table.set_transform(lambda batch: {"prompt": [f"{text}?" for text in batch["question"]]})
    assert load(table) == [{"prompt": "a?"}, {"prompt": "b?"}]


def test_images_arrive_as_objects_and_sound_without_its_decoder_is_refused():
    image = datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 3))]}).cast_column("image", datasets.Image())
    assert load(image)[0]["image"].size == (2, 3)
    sound = datasets.Dataset(
        pyarrow.table({"sound": [{"bytes": b"x", "path": "x.wav"}]}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {"sound": {"_type": "Audio"}}}})}
        )
    )
    try:
        import torchcodec  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ValueError, match="please install 'torchcodec'"):
            load(sound)
