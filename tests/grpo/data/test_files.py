"""Data files, folders, patterns and lists by name: which rows they give, with which values, and by which split."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from rankup.grpo.common.log import log_to
from rankup.grpo.data.sources import load_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": "When?", "answer": "2024-01-01"},
    {"prompt": "How much?", "answer": "12.50", "n": 7},
    {"prompt": "Who?", "answer": "007", "n": 7.0},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes = LINES) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def load(source: Any, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    return load_rows(source, split=split, **options)


def refusal(source: Any, split: str = "train", **options: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(source, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def compressed(codec: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(LINES.encode())
    return sink.getvalue().to_pybytes()


# ------------------------------------------------------------------------------------------ values


def test_values_of_a_file_do_not_depend_on_other_rows_or_on_a_block_of_it():
    many = [{"prompt": "x" * 2000, "answer": f"2024-01-{day:02}"} for day in range(1, 29)] * 250
    rows = [*many, {"prompt": "y", "answer": 7}, {"prompt": "z", "answer": ["12.50"], "extra": {"a": None}}]
    found = load(write("large.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert Path("large.jsonl").stat().st_size > 10 << 20
    assert found == rows and [type(row["answer"]) for row in found[-3:]] == [str, int, list]


def test_a_file_of_json_has_the_same_rows_under_every_suffix():
    for name in ("rows.jsonl", "ROWS.JSONL", "rows.ndjson", "rows.json"):
        assert repr(load(write(name))) == repr(ROWS)
    assert repr(load(write("list.json", json.dumps(ROWS)))) == repr(ROWS)
    assert repr(load(write("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()))) == repr(ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES.encode())),
        ("ROWS.JSONL.GZ", gzip.compress(LINES.encode()[:50]) + gzip.compress(LINES.encode()[50:])),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())),
        ("rows.ndjson.xz", lzma.compress(LINES.encode())),
        ("rows.jsonl.zst", compressed("zstd")),
        ("rows.jsonl.lz4", compressed("lz4")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compressed_files_are_read(name: str, content: bytes):
    assert load(write(name, content)) == ROWS
    broken = write(f"broken-{name}", content[:-12])
    assert f"cannot read {Path(broken).resolve()}: " in refusal(broken)


def test_the_one_file_of_a_zip_archive_is_read():
    for name in ("rows.zip", "rows.jsonl.zip", "two.zip"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("inside.jsonl", LINES)
            if name == "two.zip":
                archive.writestr("other.jsonl", LINES)
    assert load("rows.zip") == load("rows.jsonl.zip") == ROWS
    assert "two.zip has 2 files: unpack it" in refusal("two.zip")
    assert "not a zip file" in refusal(write("no.zip", "text"))


def test_cells_of_tables_of_text_are_text():
    rows = [{"prompt": "a", "answer": "007"}, {"prompt": "b, c", "answer": None}]
    assert load(write("rows.csv", 'prompt,answer\na,007\n"b, c",\n')) == rows
    assert load(write("rows.tsv", "prompt\tanswer\na\t007\nb, c\t\n")) == rows
    assert load(write("rows.csv.gz", gzip.compress(b"prompt;answer\na;007\nb, c;\n"))) == rows
    assert load(write("rows.txt", "a\nb\n")) == [{"text": "a"}, {"text": "b"}]


def typed_table() -> pyarrow.Table:
    moment = datetime.datetime(2024, 1, 1, 2, 3, 4)
    return pyarrow.table(
        {
            "date": [datetime.date(2024, 1, 1)],
            "time": [datetime.time(1, 2, 3)],
            "moment": pyarrow.array([moment], pyarrow.timestamp("ns")),
            "zoned": pyarrow.array([moment], pyarrow.timestamp("us", "Europe/Oslo")),
            "length": [datetime.timedelta(seconds=90)],
            "decimal": [Decimal("12.50")],
            "bytes": [b"\xff"],
            "category": pyarrow.array(["x"]).dictionary_encode(),
            "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "struct": [{"a": 1, "when": [datetime.date(2024, 1, 1), None]}],
            "int": [2**62],
            "float": [1.0],
            "null": pyarrow.nulls(1),
            "text": ["2024-01-01"],
        }
    )


TYPED_ROW = {
    "date": "2024-01-01",
    "time": "01:02:03",
    "moment": "2024-01-01T02:03:04",
    "zoned": "2024-01-01T03:03:04+01:00",
    "length": "P0DT0H1M30S",
    "decimal": Decimal("12.50"),
    "bytes": b"\xff",
    "category": "x",
    "map": {"k": 1},
    "struct": {"a": 1, "when": ["2024-01-01", None]},
    "int": 2**62,
    "float": 1.0,
    "null": None,
    "text": "2024-01-01",
}


@pytest.mark.parametrize("name", ["rows.parquet", "ROWS.PARQUET", "rows.arrow", "stream.arrow", "rows.parquet.gz"])
def test_typed_formats_keep_their_types_and_dates_arrive_as_text(name: str):
    table, sink = typed_table(), pyarrow.BufferOutputStream()
    if "arrow" in name:
        make = pyarrow.ipc.new_stream if name == "stream.arrow" else pyarrow.ipc.new_file
        with make(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    assert repr(load(write(name, gzip.compress(content) if name.endswith("gz") else content))) == repr([TYPED_ROW])
    assert repr(load(table)) == repr([TYPED_ROW])


def test_a_table_that_python_cannot_represent_is_refused():
    same_name = pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    assert refusal(same_name) == "the column 'a' occurs twice"
    assert "too large" in refusal(pyarrow.table({"t": pyarrow.array([2**62], pyarrow.timestamp("s"))}))
    assert "cannot read" in refusal(write("bad.arrow", "x"))


# ------------------------------------------------------------------------------------------ encodings


def test_another_encoding_is_an_error_with_line_and_option_unless_it_is_named():
    text = "prompt,answer\na,b\ncafé,c\n"
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "café", "answer": "c"}]
    latin, wide = write("latin.csv", text.encode("latin-1")), write("wide.csv", text.encode("utf-16"))
    expected = "line 3: byte 21 of the file (0xe9) is not UTF-8: set data.encoding to its encoding, such as latin-1"
    assert refusal(latin) == f"cannot read {Path.cwd()}/latin.csv, {expected}"
    assert refusal(wide).endswith("set data.encoding to its encoding, utf-16")
    assert load(latin, encoding="latin-1") == load(wide, encoding="utf-16") == rows
    assert load(write("utf.csv", text), encoding="UTF8") == rows
    assert "is not ASCII" in refusal("utf.csv", encoding="ascii")


# ------------------------------------------------------------------------------------------ types of columns


def test_types_of_columns_are_those_of_the_run_file():
    text = 'int,float,bool,json,str\n007,1.50,true,"[1, {""a"": null}]",7\n,,,,\n'
    types = {name: name for name in ("int", "float", "bool", "json", "str")}
    read, empty = load(write("rows.csv", text), column_types=types)
    assert repr(read) == repr({"int": 7, "float": 1.5, "bool": True, "json": [1, {"a": None}], "str": "7"})
    assert empty == dict.fromkeys(types)


def test_types_apply_to_every_source():
    rows = [{"a": "7"}, {"a": 7}, {"a": 7.0}, {"a": None}, {}]
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for source in ("rows.jsonl", ["rows.jsonl"], rows, iter(rows)):
        assert repr(load(source, column_types={"a": "int"})) == repr([{"a": 7}] * 3 + [{"a": None}, {}])
    assert load("rows.jsonl", column_types={"a": "str"})[:3] == [{"a": "7"}, {"a": "7"}, {"a": "7.0"}]
    table = datasets.Dataset.from_dict({"a": ["7", "8"]})
    table.to_parquet("rows.parquet")
    for source in (table, datasets.DatasetDict({"train": table}), "rows.parquet"):
        assert load(source, column_types={"a": "float"}) == [{"a": 7.0}, {"a": 8.0}]


@pytest.mark.parametrize(
    ("kind", "cell", "line"), [("int", "5.5", 3), ("float", "3,5", 3), ("bool", "maybe", 3), ("json", "{a: 1}", 3)]
)
def test_a_cell_of_another_type_is_an_error_with_line_and_column(kind: Any, cell: str, line: int):
    name = write("rows.csv", f'a,b\n"x","1"\n"y","{cell}"\n')
    reason = f"column 'b': '{cell}' is no {kind} (data.column_types)"
    assert refusal(name, column_types={"b": kind}) == f"{Path.cwd() / name}, line {line}: {reason}"
    assert refusal([{"b": "1"}, {"b": cell}], column_types={"b": kind}) == f"row 1 of the data set: {reason}"


# ------------------------------------------------------------------------------------------ names


def test_several_files_and_patterns_are_read_in_order():
    for name, line in (("b.jsonl", '{"n": 2}'), ("a.jsonl", '{"n": 1}'), ("sub/c.csv", "n\n3"), ("[x]/d.jsonl", '{"n": 4}')):
        write(name, line)
    assert load("*.jsonl") == load("./*.jsonl") == load(f"{Path.cwd()}/?.jsonl") == [{"n": 1}, {"n": 2}]
    assert load("**/*.*")[-1] == {"n": "3"}
    assert load(["b.jsonl", "a.jsonl", "sub/*.csv"]) == [{"n": 2}, {"n": 1}, {"n": "3"}]
    assert load([Path("b.jsonl")]) == load(Path("b.jsonl")) == [{"n": 2}]
    assert load("[x]/d.jsonl") == [{"n": 4}]
    assert load(["b.jsonl", "a.jsonl"], "train[1:]") == load("*.jsonl", "train[:50%]") == [{"n": 1}]


def test_an_empty_name_is_an_error():
    assert refusal("") == refusal(["a.jsonl", " "]) == "the name of a data set is empty"


def test_the_working_directory_may_be_the_folder():
    write("train.jsonl")
    assert load(".") == ROWS


def test_a_file_in_the_home_folder_and_one_at_a_url_are_read(monkeypatch: pytest.MonkeyPatch):
    write("home/rows.jsonl")
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    assert load("~/rows.jsonl") == load("~/*.jsonl") == load(f"file://{Path.cwd()}/home/rows.jsonl") == ROWS
    assert refusal("memory://nowhere.jsonl") == "no file memory://nowhere.jsonl"
    assert refusal("nowhere://rows.jsonl") == "cannot read nowhere://rows.jsonl: Protocol not known: nowhere"


@pytest.mark.parametrize(
    "name", ["no.jsonl", "no.jsonl.gz", "no.xlsx", "./no", "../no/where", "~/no", "/no/where", "sub/no", "a/b/c", "no/", "*.no"]
)
def test_a_path_that_does_not_exist_is_no_name_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    # sub/no may be on the Hub, which is asked again and again.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    Path("sub").mkdir()
    assert refusal(name).startswith("no file ")


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.pkl", "rows", "notes.md", "rows.gz"])
def test_a_file_of_another_format_is_refused_with_the_formats(name: str):
    known = "data files are .jsonl, .ndjson, .json, .parquet, .csv, .tsv, .txt, .arrow, and may be compressed (.gz, .xz, ...)"
    assert f"cannot read {Path(name).resolve()}: {known}" in refusal(write(name, gzip.compress(b"text")))


def test_other_formats_are_left_to_datasets():
    name = write("rows.conll", "EU NNP\nrejects VBZ\n\nPeter NNP\n")
    assert load(name) == [{"tokens": ["EU", "rejects"]}, {"tokens": ["Peter"]}]


# ------------------------------------------------------------------------------------------ folders and splits


def test_the_files_of_a_folder_are_its_splits():
    write("data/train-00000-of-00002.jsonl")
    write("data/train-00001-of-00002.jsonl", '{"prompt": 5}\n')
    write("data/test.jsonl", '{"answer": "2024-01-01"}\n')
    assert load("data") == [*ROWS, {"prompt": 5}]
    assert load("data", "test") == [{"answer": "2024-01-01"}]
    assert load("data", "train[1:2]+test") == [ROWS[1], {"answer": "2024-01-01"}]
    assert refusal("data", "dev") == "data has no split 'dev' (splits: train, test)"
    write("tabs/train.tsv", "a, b\tc\n1\t2\n")
    assert load("tabs") == [{"a, b": "1", "c": "2"}]
    write("plain/rows.csv.gz", gzip.compress(b"n\n007\n"))
    assert load("plain") == [{"n": "007"}]
    assert refusal("plain", "test") == "plain has no split 'test' (splits: train)"
    Path("empty").mkdir()
    assert "cannot load data set 'empty'" in refusal("empty")


def test_a_folder_may_say_which_files_are_which_split():
    write("card/a.jsonl")
    configs = "- {config_name: x, data_files: [{split: dev, path: a.jsonl}]}\n- {config_name: y}"
    write("card/README.md", f"---\nconfigs:\n{configs}\n---\n")
    assert load("card", "dev", subset="x") == ROWS
    assert "available configs: ['x', 'y'] (data.subset)" in refusal("card")
    assert "BuilderConfig 'z' not found" in refusal("card", subset="z")


def test_columns_that_a_folder_declares_have_its_types():
    configs = "configs: [{config_name: default, data_files: a.jsonl}]"
    write("card/README.md", f"---\ndataset_info: {{features: [{{name: n, dtype: int64}}]}}\n{configs}\n---\n")
    write("card/a.jsonl", '{"n": 1}\n{"n": 2}\n')
    assert load("card") == [{"n": 1}, {"n": 2}]


def test_a_folder_of_parquet_is_read_by_split():
    Path("data").mkdir()
    for split, rows in (("train", ROWS[:1]), ("test", ROWS[1:2])):
        datasets.Dataset.from_list(rows).to_parquet(f"data/{split}.parquet")
    assert load("data") == ROWS[:1] and load("data", "test[:1]") == ROWS[1:2]


def test_files_of_a_folder_that_are_not_read_are_mentioned():
    write("data/train.jsonl")
    write("data/more.csv", "n\n1\n")
    write("data/extra/MORE.JSONL")
    write("data/license.txt")
    notes: list[str] = []
    with log_to(notes.append):
        assert load("data") == ROWS
    assert notes == ["data: not read, since they are in no split: extra/MORE.JSONL, more.csv"]


def test_folders_of_save_to_disk_are_read():
    table = datasets.Dataset.from_list(ROWS[:2])
    table.save_to_disk("one")
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk("several")
    rows = load(table)
    assert load("one") == load("several") == load("several/train") == rows
    assert load("one", "test[1:]") == load("several", "dev") == load("several", "train[-1:]") == rows[1:]
    assert refusal("one", "dev") == "one has no split 'dev' (it is one split, called train or test)"
    assert refusal("several", "test") == "several has no split 'test' (splits: train, dev)"


def test_parts_of_a_split_are_those_of_datasets():
    rows: list[Any] = [{"n": n} for n in range(20)]
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    for spec in ("train[:3]", "train[10%:20%]", "train[-2:]", "train[5:7]+train[:10%]", "train[:200]"):
        expected = datasets.concatenate_datasets(
            [table["train"].select(range(one.from_, one.to)) for one in _instructions(spec)]
        ).to_list()
        assert all(load(source, spec) == expected for source in ("rows.jsonl", table, rows)), spec


def _instructions(spec: str) -> Any:
    return datasets.ReadInstruction.from_spec(spec).to_absolute({"train": 20})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dev", "rows.jsonl has no split 'dev' (it is one split, called train or test)"),
        ("dev[:2]", "rows.jsonl has no split 'dev' (it is one split, called train or test)"),
        ("train+test", "rows.jsonl is one split, called train or test: 'train+test' would repeat its rows"),
        ("train[9:]", "rows.jsonl has no rows in its split 'train[9:]'"),
        ("train[:", "the split 'train[:' of rows.jsonl: Unrecognized instruction format: train[:"),
    ],
)
def test_a_split_that_a_file_does_not_have_is_an_error(spec: str, message: str):
    assert refusal(write("rows.jsonl"), spec) == message


def test_a_part_of_data_without_a_length_is_an_error():
    message = "the data set has no length, so the split 'train[:1]' has no meaning: limit the data itself"
    assert refusal(iter(ROWS), "train[:1]") == message


def test_a_part_of_a_generated_task_is_the_start_of_its_split():
    whole = load("reasoning_gym:chain_sum", options={"size": 5})
    assert load("reasoning_gym:chain_sum", "train[:2]", options={"size": 5}) == whole[:2]
