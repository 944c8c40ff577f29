"""Completions files: sampled completions of one step with their rewards, in Parquet.

path = Path("runs/mine/completions/step_000010.parquet")
write_completions(path, 10, {"prompt": ["1 + 1?"], "completion": ["2"]}, rewards={"exact": [1.0]}, data={"answer": [2]})
read_completions(path)      # [{"step": 10, "prompt": "1 + 1?", ..., "rewards": {"exact": 1.0}, "data": {"answer": 2}}]
"""

import contextlib
import io
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.exact_json import decode, encode
from ..common.files import atomic_write

COLUMN_NAMES = "rankup.columns"
"""Key in the metadata of a file: the columns of `rewards` and `data` by their names."""

COUNTS = ("step", "num_tokens", "num_given")

JSON_COLUMNS = ("messages", "tool_calls", "sampled_spans")
EPISODE_COLUMNS = (*JSON_COLUMNS, "num_given", "failure")
"""Columns of episodes; other runs do not have them."""


def write_completions(
    path: Path,
    step: int,
    table: Mapping[str, Sequence],
    *,
    rewards: Mapping[str, Sequence[float | None]] | None = None,
    extras: Mapping[str, Sequence] | None = None,
    data: Mapping[str, Sequence] | None = None,
) -> None:
    """Write a file with a row for each completion. All columns have the same length N.

    A reward, extra or data column whose name is taken becomes `rewards/<name>`, `extras/<name>` or `data/<name>`.

    Args:
        table: prompt (conversations as JSON text), completion_prefix, completion, completion_ids, logprobs (one for each of
            them, None for a given token), advantage, reward, finish_reason, num_tokens (or some of them); of episodes messages,
            tool_calls, sampled_spans, num_given, failure. `step` is added.
        rewards: one column for each reward function, None where it did not apply.
        extras: columns that reward functions logged.
        data: the columns of the dataset, which `read_completions` returns unmodified.
    """
    import pyarrow
    import pyarrow.parquet

    num_rows = len(next(iter(table.values())))
    columns = {name: _table_column(name, values) for name, values in {"step": [step] * num_rows, **table}.items()}
    names: dict[str, Any] = {"rewards": {}, "data": {}}
    if of_episodes := [name for name in EPISODE_COLUMNS if name in table]:
        names["episode"] = of_episodes
    for name, values in (rewards or {}).items():
        column = names["rewards"][name] = _free(name, "rewards", columns)
        columns[column] = _doubles(values)
    for name, values in (extras or {}).items():
        columns[_free(name, "extras", columns)] = _typed_column(values)
    for name, values in (data or {}).items():
        column = _free(name, "data", columns)
        columns[column], is_json = _exact_column(values)
        names["data"][name] = {"column": column, "json": is_json}
    lengths = {name: len(column) for name, column in columns.items()}
    assert set(lengths.values()) == {num_rows}, f"columns of different lengths: {lengths}"

    buffer = io.BytesIO()
    with_names = pyarrow.table(columns).replace_schema_metadata({COLUMN_NAMES: json.dumps(names)})
    pyarrow.parquet.write_table(with_names, buffer)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, buffer.getvalue())


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The rows of a completions file: `prompt`, `completion`, ..., and the mappings `rewards` (by function) and `data`.

    Those of a run with episodes also have the mapping `episode`: messages, tool_calls, sampled_spans, num_given, failure.

    Raises:
        ValueError: the file was not written by `write_completions`.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    metadata = (table.schema.metadata or {}).get(COLUMN_NAMES.encode())
    if metadata is None:
        raise ValueError(f"{path} holds no completions that a run has saved")
    names = json.loads(metadata)
    rows = []
    for row in table.to_pylist():
        data = {name: (row.pop(one["column"]), one["json"]) for name, one in names["data"].items()}
        rewards = {name: row.pop(column) for name, column in names["rewards"].items()}
        episode = {name: row.pop(name) for name in names.get("episode", ())}
        episode |= {name: json.loads(episode[name]) for name in JSON_COLUMNS if episode.get(name) is not None}
        decoded = {name: decode(v) if is_json and v is not None else v for name, (v, is_json) in data.items()}
        rows.append({**row, "rewards": rewards, "data": decoded, **({"episode": episode} if episode else {})})
    return rows


def _free(name: str, prefix: str, columns: Container[str]) -> str:
    """The name, with as many prefixes as make it the name of no other column."""
    while name in columns:
        name = f"{prefix}/{name}"
    return name


def _exact_column(values: Sequence) -> tuple[Any, bool]:
    """A Parquet column that holds the values exactly, and whether they are encoded as JSON."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    numbers = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    types = {**numbers, str: pyarrow.string(), bytes: pyarrow.binary()}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in types:
        try:
            return pyarrow.array(values, types[kind]), False
        except (OverflowError, UnicodeEncodeError):  # an integer of more than 64 bits; half of a surrogate pair
            pass
    texts = [None if value is None else encode(value) for value in values]
    return pyarrow.array(texts, pyarrow.string()), True


def _table_column(name: str, values: Sequence) -> Any:
    """A Parquet column of the run's own, whose type depends on its name."""
    import pyarrow

    if name == "prompt":  # a text stays as it is, also beside conversations
        return pyarrow.array([value if isinstance(value, str) else _json(value) for value in values], pyarrow.string())
    if name == "completion_ids":
        return pyarrow.array(values, pyarrow.list_(pyarrow.int32()))
    if name == "logprobs":
        return pyarrow.array(values, pyarrow.list_(pyarrow.float32()))
    if name in COUNTS:
        return pyarrow.array(values, pyarrow.int64())
    if name == "failure":
        return pyarrow.array(values, pyarrow.string())
    return _json_strings(values) if name in JSON_COLUMNS else _typed_column(values)


def _typed_column(values: Sequence) -> Any:
    """A Parquet column whose type depends only on the kind of values, so that the files of all steps form one table.

    Numbers (and columns without values) are doubles; values that are neither text nor number are JSON.
    """
    import pyarrow

    present = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in present) and present:
        return pyarrow.array(values, pyarrow.string())
    if all(isinstance(value, bool) for value in present) and present:
        return pyarrow.array(values, pyarrow.bool_())
    if all(hasattr(value, "__float__") for value in present):
        with contextlib.suppress(OverflowError):  # an integer beyond all doubles
            return _doubles(values)
    return _json_strings(values)


def _doubles(values: Sequence) -> Any:
    import pyarrow

    return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())


def _json_strings(values: Sequence) -> Any:
    import pyarrow

    return pyarrow.array([None if value is None else _json(value) for value in values], pyarrow.string())


def _json(value: Any) -> str:
    return json.dumps(value, default=str)
