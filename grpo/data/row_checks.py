"""The columns of all rows, checked before anything is started: what reward functions and records cannot use is an error by row.

check_rows(scorer, inputs.train_prompts.rows, "training data")
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...rewards.runner import Scorer
from ...rewards.texts import describe
from ..common.exact_json import encode
from ..common.log import logger
from .prompts import Prompt

CHECK_SECONDS = 60.0
"""How long a run may check the rows of a data set before it starts: parsing a formula takes 10 ms. Later rows are checked when
they are scored."""


def check_rows(
    scorer: Scorer, prompts: Sequence[Prompt], data: str, set_scorers: Mapping[str, Scorer] | None = None
) -> None:
    """Check that records can hold the columns of every row, and that the reward functions can use them.

    data: the name of the data set in messages. set_scorers: of evaluation sets that have their own functions, by name.

    Raises:
        ValueError: a row cannot be used: its number, the column, the reason and the remedy.
    """
    end, is_checked, of_sets = time.monotonic() + CHECK_SECONDS, True, set_scorers or {}
    for index, prompt in enumerate(prompts):
        if is_checked and time.monotonic() > end:
            is_checked = False
            logger.info(
                f"reward functions have checked {index} of {len(prompts)} rows of the {data} in {CHECK_SECONDS:g} s: the "
                "others are checked when they are scored"
            )
        try:
            check_record(prompt.columns)
            if is_checked:
                of_sets.get(prompt.eval_set or "", scorer).check_row(prompt.columns)
        except ValueError as error:
            of_set = "" if prompt.eval_set is None else f" (set {prompt.eval_set!r})"
            raise ValueError(f"row {prompt.row} of the {data}{of_set}: {error}") from error


def check_record(columns: Mapping[str, Any]) -> None:
    """Raise ValueError, with the column, if the records of completions cannot hold a row's columns: functions, objects, sets,
    lists that contain themselves."""
    for name, value in columns.items():
        if value is None or isinstance(value, str | int | float):
            continue
        try:
            encode(value, default=_refused)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"column {name!r} cannot be recorded ({describe(error)}). Use text, numbers, true and false, lists, and "
                "mappings; a function or an object can be looked up by its name in the reward function"
            ) from error


def _refused(value: object) -> str:
    raise TypeError(f"a value of type {type(value).__name__}")
