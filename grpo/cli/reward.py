"""The commands `rankup new reward` and `rankup reward`: write a template of a reward function, and try one without training.

rankup new reward short_answers                                     # short_answers.py and its test
rankup reward short_answers.py:short_answers --data runs/quickstart # on the completions that the run has saved
rankup reward rankup.rewards.lengths:target_length --kwargs "{tokens: 20, tolerance: 10}" --data rows.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from yaml import YAMLError

from ...rewards.config import RewardFunction, RewardsConfig
from ...rewards.contract import RESERVED_ARGUMENTS, Inputs
from ...rewards.runner import Scorer
from ...rewards.texts import text_of
from ..common.exact_json import encode
from ..config import DataConfig, GRPOConfig, load_config
from ..config.loading import parse_yaml
from ..config.run_folders import function_of_run
from ..data.messages import BadRowError, read_prompt
from ..run.completions import read_completions
from ..run.records import CONFIG_FILE
from .command import add_command

EXAMPLES = """examples:
  rankup new reward short_answers                                        writes short_answers.py and test_short_answers.py
  rankup reward short_answers.py:short_answers --data runs/quickstart    on the saved completions of a run
  rankup reward last_integer --data rows.jsonl --json                    on a file with columns completion, answer, ...
  rankup reward soft_overlong --kwargs "{max_completion_length: 24, cache_tokens: 8}" --data runs/quickstart
"""

REWARD_TEMPLATE = '''"""A reward for rankup and TRL: {title}.

    rewards:
      functions: {name}.py:{name}          # found next to the run file or in the working directory

Try it on the completions of a run, without training: rankup reward {name}.py:{name} --data runs/RUN
"""


def {name}(completions, **kwargs):
    """One number for each completion; None if the reward does not apply to it.

    `completions` has all completions of one prompt: strings, or lists of messages if the prompt is a conversation. Further
    keyword arguments: `prompts`, `completion_ids` (token ids), every other column of the data (such as `answer`),
    `trainer_state.global_step`, `log_metric(name, value)`, `log_extra(column, values)`.
    """
    return [1.0 if 0 < len(text_of(completion).split()) <= 20 else 0.0 for completion in completions]


def text_of(completion):
    """The text, or in a conversation that of the assistant's last message."""
    if isinstance(completion, str):
        return completion
    answers = [message.get("content") for message in completion if message["role"] == "assistant"]
    return (answers[-1] if answers else None) or ""
'''

TEST_TEMPLATE = '''"""Completions with a known reward. A wrong reward trains the wrong behavior, and no other check finds it."""

from {name} import {name}


def test_{name}():
    conversation = [{{"role": "assistant", "content": "Short enough."}}]
    assert {name}(["Short enough.", "", "word " * 21]) == [1.0, 0.0, 0.0]
    assert {name}([conversation]) == [1.0]
'''


def add_reward_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `new` and `reward` to the command line."""
    new = add_command(commands, "new", "write a template to start from", examples=EXAMPLES, run=new_reward)
    new.add_argument("what", choices=["reward"], help="what to write")
    new.add_argument("name", help="name of the function and of its file")
    new.add_argument("--dir", type=Path, default=Path(), help="folder to write to (default: the working directory)")

    text = "try a reward function on saved completions, without training"
    reward = add_command(commands, "reward", text, examples=EXAMPLES, run=try_reward)
    reward.add_argument("function", help="path/to/file.py:name, package.module:name, or a built-in's name")
    reward.add_argument("--data", required=True, help="a run folder, or data as in data.train with a column `completion`")
    reward.add_argument("--split", default="train", help="split of the data, or a part of it (default train)")
    reward.add_argument("--subset", help="subset of a data set that has several")
    reward.add_argument("--column-types", help="types of columns as in data.column_types: '{answer: int}'")
    reward.add_argument("--encoding", default="utf-8", help="encoding of a file of text (default utf-8)")
    reward.add_argument("--kwargs", help="arguments of a factory, as YAML or JSON: '{tokens: 100}'")
    reward.add_argument("--rows", type=int, default=256, help="score at most this many completions, the newest (default 256)")
    reward.add_argument(
        "--isolation", choices=["inline", "process", "ray"], default="inline", help="where the function runs (default inline)"
    )
    reward.add_argument("--timeout", type=float, default=60.0, help="seconds per prompt, unless inline (default 60)")
    reward.add_argument("--json", action="store_true", help="print the rows and the summary as one JSON object")


def new_reward(options: argparse.Namespace) -> int:
    """`rankup new reward NAME`"""
    name: str = options.name
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot be the name of a function: use letters, digits and underscores")
    files = {
        options.dir / f"{name}.py": REWARD_TEMPLATE.format(name=name, title=name.replace("_", " ")),
        options.dir / f"test_{name}.py": TEST_TEMPLATE.format(name=name),
    }
    for path in files:
        if os.path.exists(path):
            raise ValueError(f"{path} already exists: choose another name, or remove it")
    options.dir.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    module = options.dir / f"{name}.py"
    print(f"test it:   pytest {options.dir / f'test_{name}.py'}")
    print(f"try it:    rankup reward {module}:{name} --data runs/RUN")
    print(f"train on:  rewards.functions={module}:{name}")
    return 0


# --------------------------------------------------------------------------------------------------------- rankup reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The rewards of saved completions; `recorded` are those that the run itself has recorded, if it used the function."""

    name: str
    completions: list[Any]
    rewards: list[float | None]
    errors: list[str | None]
    recorded: list[float | None] | None
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Counts, statistics, and how many rewards differ from the recorded ones."""
        known = [r for r in self.rewards if r is not None]
        summary: dict[str, Any] = {
            "function": self.name,
            "completions": len(self.rewards),
            "mean": statistics.fmean(known) if known else None,
            "std": statistics.stdev(known) if len(known) > 1 else None,
            "min": min(known, default=None),
            "max": max(known, default=None),
            "none": len(self.rewards) - len(known),
            "failed": sum(error is not None for error in self.errors),
            "milliseconds_per_completion": 1000 * self.seconds / max(1, len(self.rewards)),
        }
        if self.recorded is not None:
            pairs = zip(self.rewards, self.recorded, strict=True)
            summary["differ_from_recorded"] = sum(not _equal(now, then) for now, then in pairs)
        return summary


def try_reward(options: argparse.Namespace) -> int:
    """`rankup reward FUNCTION --data RUN|FILE`"""
    kwargs = None if options.kwargs is None else _mapping("--kwargs", options.kwargs, "{tokens: 100}")
    reading = _reading(options)
    if options.rows < 1:
        raise ValueError(f"--rows must be at least 1 (got {options.rows})")
    if not 0 < options.timeout < math.inf:
        raise ValueError(f"--timeout must be a positive number of seconds (got {options.timeout:g})")
    config = RewardsConfig(
        functions=[RewardFunction(function=_function(options), kwargs=kwargs)],
        isolation=options.isolation,
        timeout=options.timeout,
        on_error="none",
    )
    with closing(Scorer(config)) as scorer:
        trial = _score_saved(scorer, _read_rows(options.data, reading)[-options.rows :])
    if options.json:
        rows = [
            {"completion": c, "reward": r, "error": e}
            for c, r, e in zip(trial.completions, trial.rewards, trial.errors, strict=True)
        ]
        print(json.dumps({**trial.summary(), "rows": rows}))
    else:
        _show(trial)
    return 1 if trial.summary()["failed"] else 0


def _function(options: argparse.Namespace) -> str:
    """The function, whose file may be where the run of `--data` has found it."""
    data = Path(expanduser(options.data))
    inside = data.absolute().parent if data.match("step_*.parquet") else data.absolute()
    config = (inside.parent if inside.name == "completions" else data) / CONFIG_FILE
    functions = [entry.function for entry in load_config(config).rewards.entries()] if os.path.isfile(config) else []
    return function_of_run(options.function, functions)


def _mapping(option: str, text: str, example: str) -> dict[str, Any]:
    """The value of an option that takes a mapping, read as a run file is."""
    wanted = f"{option} must be a mapping, such as '{example}'"
    try:
        value = parse_yaml(text)
    except YAMLError as error:
        raise ValueError(f"{wanted}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{wanted} (got {text})")
    return value


@dataclass(frozen=True, slots=True)
class _Row:
    """A saved completion with the data set's columns; `rewards` are those that the run has recorded, by function."""

    prompt: Any
    completion: Any
    completion_prefix: str
    completion_ids: list[int]
    num_sampled: int
    columns: dict[str, Any]
    rewards: dict[str, float | None]


def _reading(options: argparse.Namespace) -> DataConfig:
    """How to read data that no run has saved. Raises ValueError for mistakes in the options."""
    types = {} if options.column_types is None else _mapping("--column-types", options.column_types, "{answer: int}")
    data = {"train_split": options.split, "subset": options.subset, "encoding": options.encoding, "column_types": types}
    return GRPOConfig(data=data).data


def _read_rows(source: str, reading: DataConfig) -> list[_Row]:
    """Saved completions, oldest first."""
    path = Path(expanduser(source))
    is_saved = path.match("step_*.parquet") and os.path.isfile(path)
    folder = path if path.name == "completions" else path / "completions"
    files = [path] if is_saved else sorted(folder.glob("step_*.parquet"))
    if files:
        rows = [row for file in files for row in read_completions(file)]
        scored = [row for row in rows if "episode" not in row or row["episode"]["failure"] is None]
        if rows and not scored:
            raise ValueError(f"all {len(rows)} completions of {source} are void episodes, which no reward function sees")
        return [_saved_row(row) for row in scored]
    try:
        return _rows_of_data(source, reading)
    except ValueError as error:
        if not os.path.isdir(path):
            raise
        raise ValueError(f"{source} has no saved completions, and is no data either: {error}") from error


def _saved_row(row: Mapping[str, Any]) -> _Row:
    """A completion that a run has saved. An episode in a conversation is its messages."""
    prompt, episode = read_prompt(row["prompt"]), row.get("episode", {})
    is_dialogue = not isinstance(prompt, str) and episode.get("messages") is not None
    return _row(
        {**row, "completion": episode["messages"]} if is_dialogue else row,
        prompt,
        columns=row["data"],
        rewards=row["rewards"],
        num_given=episode.get("num_given", 0),
    )


def _rows_of_data(source: str, reading: DataConfig) -> list[_Row]:
    """Those of a user's data, which is read as training data is. A column that a row lacks is None, as in training."""
    from ..data.sources import load_rows  # here: `datasets` takes half a second
    from ..data.values import check_column_types

    rows = load_rows(
        source,
        split=reading.train_split,
        subset=reading.subset,
        encoding=reading.encoding,
        column_types=reading.column_types,
    )
    check_column_types(rows, reading.column_types)
    names = dict.fromkeys(name for row in rows for name in row)
    if "completion" not in names:
        raise ValueError(f"cannot read completions from {source}: it has no column `completion` (columns: {', '.join(names)})")
    for index, row in enumerate(rows):
        if row.get("completion") is None:
            raise ValueError(f"row {index} of {source} has no completion")
    columns = [name for name in names if name not in ("prompt", "completion", "completion_prefix", *RESERVED_ARGUMENTS)]
    return [
        _row(
            row,
            _prompt_of(row, index),
            columns={name: row.get(name) for name in columns},
            rewards={},
        )
        for index, row in enumerate(rows)
    ]


def _prompt_of(row: Mapping[str, Any], index: int) -> Any:
    """The prompt of a user's row as training reads it; an empty text if there is none."""
    prompt = row.get("prompt")
    try:
        return "" if prompt is None else read_prompt(prompt)
    except BadRowError as error:
        raise ValueError(f"the prompt of row {index} {error}") from error


def _row(
    row: Mapping[str, Any],
    prompt: Any,
    *,
    columns: dict[str, Any],
    rewards: dict[str, float | None],
    num_given: int = 0,
) -> _Row:
    """With the completion as reward functions get it: a conversation if the prompt is one."""
    completion = row["completion"]
    if isinstance(completion, str) and not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": completion}]
    prefix = row.get("completion_prefix") or ""
    ids: list[int] = list(row.get("completion_ids") or ())
    return _Row(prompt, completion, prefix, ids, len(ids) - num_given, columns, rewards)


def _score_saved(scorer: Scorer, rows: Sequence[_Row]) -> Trial:
    """Score rows as a run would: all completions of a prompt in one call."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: encode([row.prompt, row.columns]))]
    (name,) = scorer.names
    scorer.check_columns(rows[0].columns)
    started = time.perf_counter()
    scores = [pending.result() for pending in [scorer.submit(_inputs(group)) for group in groups]]
    seconds = time.perf_counter() - started
    known = all(name in row.rewards for row in rows)
    return Trial(
        name=name,
        completions=[row.completion for row in rows],
        rewards=[reward for one in scores for reward in one.by_function[name]],
        errors=[e for one in scores for e in one.errors.get(name, [None] * len(one.total))],
        recorded=[row.rewards[name] for row in rows] if known else None,
        seconds=seconds,
    )


def _inputs(group: Sequence[_Row]) -> Inputs:
    return Inputs(
        prompts=[row.prompt for row in group],
        completions=[row.completion for row in group],
        completion_ids=[row.completion_ids for row in group],
        columns={name: [row.columns[name] for row in group] for name in group[0].columns},
        trainer_state={"global_step": 0, "max_steps": 0, "epoch": 0.0, "log_history": []},
        completion_prefixes=[row.completion_prefix for row in group],
        sampled_lengths=[row.num_sampled for row in group],
    )


def _equal(now: float | None, then: float | None) -> bool:
    return now == then if now is None or then is None else math.isclose(now, then, rel_tol=1e-6, abs_tol=1e-9)


def _show(trial: Trial) -> None:
    """Print a summary, and the completions with the highest and the lowest rewards."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, show_header=False)
    for name, value in trial.summary().items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    ranked = sorted((r, i) for i, r in enumerate(trial.rewards) if r is not None)
    examples = Table(box=None, title="highest and lowest", title_justify="left", title_style="bold")
    examples.add_column("reward", justify="right", no_wrap=True, min_width=6)
    examples.add_column("completion", overflow="ellipsis", no_wrap=True)
    for reward, index in dict.fromkeys([*reversed(ranked[-3:]), *reversed(ranked[:3])]):
        examples.add_row(f"{reward:.3g}", escape(" ".join(text_of(trial.completions[index]).split())))
    if ranked:
        console.print(examples)
    for reason in dict.fromkeys(error for error in trial.errors if error is not None):
        console.print(f"failed: {escape(reason)}", soft_wrap=True)
