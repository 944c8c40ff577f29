"""Values on their way from a source through prompts, rewards and records to `rankup reward`: they stay what they are."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tiny_runs import tiny_config

from rankup.grpo.cli.main import main
from rankup.grpo.common.world import SINGLE_PROCESS
from rankup.grpo.data.prompts import Prompt, prepare_prompts
from rankup.grpo.data.sources import DataSource, load_rows
from rankup.grpo.experience.collect import collect
from rankup.grpo.experience.step_metrics import completions_table
from rankup.grpo.run.records import RunRecorder
from rankup.rewards.config import RewardsConfig
from rankup.rewards.runner import Scorer
from rankup.rollout.types import Completion, PromptGroup

Row = dict[str, Any]

FILES = 40
"""Files that are made of each of the five kinds of source."""

SEE = """
from pathlib import Path
from zlib import crc32

def see(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    lines = [repr((prompt, dict(sorted(zip(columns, row))))) for prompt, *row in zip(prompts, *columns.values())]
    with Path("seen.txt").open("a", encoding="ascii") as file:
        file.writelines(f"{ascii(line)}\\n" for line in lines)
    return [crc32(line.encode("utf-8", "surrogatepass")) % 1000 for line in lines]
"""

TOKENIZER = tiny_tokenizer()


class Repeating:
    """An engine whose completions of a prompt are two fixed texts."""

    device = "cpu"
    policy_version = 0

    def rollout(self, prompts: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Iterator[PromptGroup]:
        made = [
            Completion(token_ids=(5,), logprobs=(0.0,), text=text, finish_reason="stop", policy_version=0)
            for text in ("", "007\u2028")
        ]
        for index, ids in enumerate(prompts):
            yield PromptGroup(index=index, prompt_token_ids=tuple(ids), completions=tuple(made))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a reward function that writes down what it sees."""
    monkeypatch.chdir(tmp_path)
    Path("see.py").write_text(SEE)
    return tmp_path


def seen() -> list[str]:
    """What the function has seen since the last call, a line for each completion."""
    path = Path("seen.txt")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [eval(line) for line in lines]


def expected_of(rows: Sequence[Row]) -> list[str]:
    """What it should see, a line for each row: None for columns that the row lacks."""
    names = sorted(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
    return [repr((row["prompt"], {name: row.get(name) for name in names})) for row in rows]


def trained_on(prompts: Sequence[Prompt], run: Path) -> None:
    """Score completions of the prompts as a step does, and record them."""
    config = tiny_config(run)
    with closing(Scorer(RewardsConfig(functions=["see.py:see"]))) as scorer:
        groups = collect(
            Repeating(),  # type: ignore[arg-type]  # `collect` needs no more of an engine
            scorer,
            prompts,
            config.rollout,
            seeds=None,
            trainer_state={"global_step": 0},
            world=SINGLE_PROCESS,
        ).groups
    table = completions_table([dataclasses.replace(group, advantages=(0.0, 0.0)) for group in groups])
    with closing(RunRecorder(run, config_yaml="")) as recorder:
        recorder.completions(1, table.table, rewards=table.rewards, extras=table.extras, data=table.data)


def tried(data: str | Path, *options: str) -> dict[str, Any]:
    """The result of `rankup reward`."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["reward", "see.py:see", "--data", str(data), "--json", *options]) == 0
    return json.loads(printed.getvalue())


def check_way(source: DataSource, rows: list[Row]) -> None:
    """The rows of a source, from prompts to `rankup reward` on the run, and on the file itself."""
    seen()
    expected = [line for line in expected_of(rows) for _ in range(2)]  # the completions of the engine
    prompts = prepare_prompts(load_rows(source, split="train"), TOKENIZER, max_prompt_length=10**6).rows
    trained_on(prompts, Path("run"))
    assert seen() == expected
    assert tried("run")["differ_from_recorded"] == 0
    assert seen() == expected
    if isinstance(source, str):
        assert tried(source)["completions"] == len(rows)
        assert seen() == expected_of([{name: row[name] for name in row if name != "completion"} for row in rows])


# ------------------------------------------------------------------------------------------ generated files

UNICODE = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(UNICODE, max_size=12) | st.sampled_from(
    [
        "2024-01-01",
        "12.50",
        "007",
        "true",
        "null",
        "[1, 2]",
        "1e5",
        "NA",
        "NaN",
        " x ",
        "a\nb\r\nc",
        '"',
        "\u2028\x85\x0c",
        "\0",
        "é",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
PROMPTS = st.text(UNICODE, min_size=1, max_size=30).map("?".__add__)
CONVERSATIONS = st.lists(PROMPTS, min_size=1, max_size=3).map(
    lambda texts: [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]
)
NAMES = st.sampled_from(["answer", "n", "tests", "reward", "step", "größe", "a b", "completion_"])


@st.composite
def rows_of_json(draw: st.DrawFn) -> list[Row]:
    prompts = draw(st.sampled_from([PROMPTS, CONVERSATIONS]))
    columns = draw(st.lists(NAMES, unique=True, max_size=4))
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, 6))):
        present = [name for name in columns if draw(st.booleans())]
        rows.append({"prompt": draw(prompts), "completion": draw(TEXTS), **{name: draw(VALUES) for name in present}})
    return rows


@st.composite
def rows_of_csv(draw: st.DrawFn) -> list[Row]:
    columns = draw(st.lists(NAMES, unique=True, max_size=4))
    count = draw(st.integers(1, 6))
    return [
        {"prompt": draw(PROMPTS), "completion": f"x{draw(TEXTS)}", **{name: draw(TEXTS) for name in columns}}
        for _ in range(count)
    ]


def optional(values: st.SearchStrategy[Any], count: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | values, min_size=count, max_size=count)


MOMENTS = st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2200, 1, 1))
COLUMNS: dict[str, tuple[st.SearchStrategy[Any], pyarrow.DataType]] = {
    "text": (TEXTS, pyarrow.string()),
    "int": (st.integers(-(2**63), 2**63 - 1), pyarrow.int64()),
    "small": (st.integers(0, 255), pyarrow.uint8()),
    "float": (st.floats(allow_nan=False), pyarrow.float64()),
    "bool": (st.booleans(), pyarrow.bool_()),
    "bytes": (st.binary(max_size=8), pyarrow.binary()),
    "date": (st.dates(datetime.date(1970, 1, 1)), pyarrow.date32()),
    "time": (st.times(), pyarrow.time64("us")),
    "moment": (MOMENTS, pyarrow.timestamp("us")),
    "decimal": (st.decimals(-999, 999, places=2), pyarrow.decimal128(7, 2)),
    "list": (st.lists(st.none() | TEXTS, max_size=3), pyarrow.list_(pyarrow.string())),
    "nested": (
        st.builds(lambda a, b: {"a": a, "b": b}, st.none() | TEXTS, st.lists(st.integers(0, 9), max_size=2)),
        pyarrow.struct({"a": pyarrow.string(), "b": pyarrow.list_(pyarrow.int64())}),
    ),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[pyarrow.Table, list[Row]]:
    """A table with types, and the rows that it should be."""
    names = draw(st.lists(st.sampled_from(list(COLUMNS)), unique=True, max_size=5))
    count = draw(st.integers(1, 6))
    prompts = draw(st.lists(draw(st.sampled_from([PROMPTS, CONVERSATIONS])), min_size=count, max_size=count))
    columns: dict[str, Any] = {"prompt": prompts, "completion": draw(st.lists(TEXTS, min_size=count, max_size=count))}
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    for name in names:
        strategy, kind = COLUMNS[name]
        columns[name] = draw(optional(strategy, count))
        arrays[name] = pyarrow.array(columns[name], kind)
    rows = [dict(zip(columns, map(_as_text, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return pyarrow.table(arrays), rows


def _as_text(value: Any) -> Any:
    is_date = isinstance(value, datetime.date | datetime.time)
    return value.isoformat() if is_date else value


many_files = settings(
    max_examples=FILES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@many_files
@given(
    rows=rows_of_json(),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    start=st.sampled_from(["", "\ufeff"]),
)
def test_rows_of_json_lines_stay_what_they_are(folder: Path, rows: list[Row], ascii_only: bool, end: str, start: str):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    Path("rows.jsonl").write_bytes((start + end.join(lines)).encode())
    check_way("rows.jsonl", rows)


@many_files
@given(rows=rows_of_json(), ascii_only=st.booleans(), indent=st.none() | st.integers(0, 2))
def test_rows_of_a_json_list_stay_what_they_are(folder: Path, rows: list[Row], ascii_only: bool, indent: int | None):
    Path("rows.json").write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode())
    check_way("rows.json", rows)


@many_files
@given(rows=rows_of_csv(), delimiter=st.sampled_from(",;\t"), end=st.sampled_from(["\n", "\r\n"]))
def test_cells_of_csv_stay_what_they_are(folder: Path, rows: list[Row], delimiter: str, end: str):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    name = "rows.tsv" if delimiter == "\t" else "rows.csv"
    Path(name).write_bytes(file.getvalue().encode())
    check_way(name, [{column: cell or None for column, cell in row.items()} for row in rows])


@many_files
@given(made=tables())
def test_rows_of_parquet_stay_what_they_are(folder: Path, made: tuple[pyarrow.Table, list[Row]]):
    table, rows = made
    pyarrow.parquet.write_table(table, "rows.parquet")
    check_way("rows.parquet", rows)


@many_files
@given(made=tables())
def test_rows_of_a_data_set_stay_what_they_are(folder: Path, made: tuple[pyarrow.Table, list[Row]]):
    table, rows = made
    check_way(datasets.Dataset(table), rows)


# ------------------------------------------------------------------------------------------ a complete run

HARD: list[Row] = [
    {"prompt": "When?", "answer": "2024-01-01", "gold": Decimal("12.50"), "parts": [{"a": None}, 1, 1.0, True, "1"]},
    {"prompt": "How much?", "answer": "12.50", "gold": b"\xff\x00", "parts": {"1": {"$rankup.bytes": "eA=="}}},
    {"prompt": "[1, 2]", "answer": 2**70, "gold": None, "parts": []},
    {"prompt": " \u2028 ", "answer": "", "gold": -0.0, "parts": "null"},
]


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_a_complete_run_and_its_records_have_the_values_of_the_source(folder: Path, make_trainer: Callable, isolation: str):
    changes = {"completions_steps": 1, "max_steps": 1, "prompts_per_step": len(HARD), "shuffle": False, "eval_before": False}
    with make_trainer(reward=["see.py:see"], rows=HARD, isolation=isolation, **changes) as trainer:
        trainer.train()
    in_training = seen()
    assert set(in_training) == set(expected_of(HARD))
    assert tried("run")["differ_from_recorded"] == 0
    assert seen()[::4] == expected_of(HARD)
