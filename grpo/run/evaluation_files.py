"""Evaluation files: all results of one evaluation as JSON, for `rankup compare` and for code of your own.

    write_evaluation(run / "evaluations" / own_name(20, "during"), record)      # `evaluation_records.py` makes it
    record = read_evaluation(run / "evaluations" / "step_000020.json")
    record.all.estimates["reward"].mean, record.prompts[0].rewards

A run writes one for each of its evaluations, `rankup eval` for its own. docs/evaluation.md describes the fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..algorithm.estimates import Estimate
from ..common.exact_json import strict
from ..common.files import atomic_write
from ..display.view_text import When

EVALUATIONS = "evaluations"
"""The folder in a run folder."""

FORMAT = "rankup-evaluation-1"

_OWN = re.compile(r"step_(\d{6,})(_after)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """The completions of one prompt.

    Attributes:
        eval_set: name of its set; None if the sets have no names.
        hash: of the prompt's content, which identifies it in other evaluations.
        prompt: the text, or the messages.
        rewards: of each completion; None: no reward.
        texts: of each completion.
        answers: that the reward functions found in each completion; None if they log none.
        functions: the rewards of each function.
    """

    eval_set: str | None
    hash: str
    prompt: str | list[Any]
    rewards: list[float | None]
    texts: list[str]
    answers: list[Any] | None
    functions: dict[str, list[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """What the evaluation of a set, or of all sets together, says: the estimates by name, and each function's mean reward."""

    prompts: int
    completions: int
    estimates: dict[str, Estimate]
    functions: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation.

    Attributes:
        about: `model`, `adapter` (its folder, if a saved one was evaluated), `run` (name), `step` (updates done), and `when`
            (before, during or after training; None: on request).
        settings: `sampling`, `seed`, `pass_reward`, `engine`, `dtype`, `load_in`, `data` (as in the configuration).
        metrics: those of `metrics.jsonl`.
        all: of all prompts. sets: of each named set.
    """

    about: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, float]
    all: SetResult
    sets: dict[str, SetResult]
    prompts: list[PromptResult]


# --------------------------------------------------------------------------------------------------------------- files


def write_evaluation(path: Path, record: EvaluationRecord) -> None:
    """Write the file, and its folder if that is missing. A number that is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = strict({"format": FORMAT, **dataclasses.asdict(record)})
    atomic_write(path, (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_evaluation(path: Path) -> EvaluationRecord:
    """The content of an evaluation file. Means that are not known are NaN.

    Raises:
        ValueError: it is no evaluation file, or one of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an evaluation: {error}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is no evaluation file of this version: its format is {found!r}, not {FORMAT!r}")
    return EvaluationRecord(
        about=values["about"],
        settings=values["settings"],
        metrics={name: _number(value) for name, value in values["metrics"].items()},
        all=_read_set(values["all"]),
        sets={name: _read_set(one) for name, one in values["sets"].items()},
        prompts=[
            PromptResult(
                eval_set=one["eval_set"],
                hash=one["hash"],
                prompt=one["prompt"],
                rewards=one["rewards"],
                texts=one["texts"],
                answers=one["answers"],
                functions=one["functions"],
            )
            for one in values["prompts"]
        ],
    )


def own_name(step: int, when: When) -> str:
    """The name of the file of a run's own evaluation after `step` steps. That after training has another name: it may be of an
    earlier policy."""
    return f"step_{step:06d}{'_after' if when == 'after' else ''}.json"


def own_files(run_dir: Path) -> list[Path]:
    """The files of a run's own evaluations, the last one last."""
    found = [path for path in (run_dir / EVALUATIONS).glob("step_*.json") if _OWN.fullmatch(path.stem)]
    return sorted(found, key=lambda path: (_step(path), path.stem))


def remove_after(run_dir: Path, step: int) -> None:
    """Remove the evaluations of a run that a run which resumes after `step` steps makes again."""
    for path in own_files(run_dir):
        if _step(path) > step or path.stem.endswith("_after"):
            path.unlink()


def _step(path: Path) -> int:
    match = _OWN.fullmatch(path.stem)
    assert match is not None
    return int(match[1])


def _read_set(values: Mapping[str, Any]) -> SetResult:
    return SetResult(
        prompts=values["prompts"],
        completions=values["completions"],
        estimates={
            name: Estimate(mean=_number(one["mean"]), low=_number(one["low"]), high=_number(one["high"]))
            for name, one in values["estimates"].items()
        },
        functions={name: _number(value) for name, value in values["functions"].items()},
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
