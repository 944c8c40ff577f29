"""Rows of Reasoning Gym's tasks.

    gym_rows("chain_sum", split="train", options={"size": 100})
"""

import dataclasses
import difflib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from ..common.errors import first_line
from .values import Row

_DEFAULT_SEED = 42


def gym_rows(task: str, *, split: str, options: Mapping[str, Any]) -> list[Row]:
    """Generate a task's rows, with the columns prompt, answer, metadata (JSON) and task.

    `options` are size, seed and the options of the task. Every split has a different seed.

    Raises:
        ValueError: no such task or option.
    """
    from reasoning_gym.factory import DATASETS, create_dataset  # imported here since it takes seconds

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        offer = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"reasoning_gym has no task {task!r}{offer}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"reasoning_gym:{task} has no option {unknown[0]!r} (options: {', '.join(known)})")
    seed = options.get("seed", _DEFAULT_SEED)
    # Row i of a task depends on seed + i, so a split that started at seed + 1 would repeat almost all rows of another: the
    # seeds of splits are far apart.
    offset = 0 if split == "train" else zlib.crc32(split.encode()) % 2**30
    try:
        made = create_dataset(task, **{**options, "seed": seed + offset})
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task}: invalid options: {first_line(error)}") from error
    return [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "metadata": json.dumps(entry["metadata"], default=str),
            "task": task,
        }
        for entry in (made[index] for index in range(len(made)))
    ]
