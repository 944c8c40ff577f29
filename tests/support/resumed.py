"""Runs that fail on purpose and are resumed: a noisy reward, how it fails, and the files that must be equal in the end."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
from tiny_runs import timeless

from rankup.grpo.run.evaluation_files import own_files

OPTIONS: dict[str, Any] = {"max_steps": 6, "eval_steps": 2, "save_steps": 4, "completions_steps": 2}


class FaultError(Exception):
    """What a reward function raises in these tests."""


def low_ids_with_noise(completion_ids: list, **kwargs: Any) -> list[float]:
    """A reward that also draws from Python's global generator."""
    return [sum(token < 130 for token in ids) / len(ids) + 0.01 * random.random() for ids in completion_ids]


def failing_at(step: int, error: BaseException) -> Callable[..., list[float]]:
    """The same reward under the same name, that raises in a step (from 0)."""

    def low_ids_with_noise_until(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == step:
            raise error
        return low_ids_with_noise(completion_ids)

    functools.update_wrapper(low_ids_with_noise_until, low_ids_with_noise)  # the same code to a run that resumes
    return low_ids_with_noise_until


def left_behind(run: Path) -> dict[str, Any]:
    """Everything that must be the same: adapter, metrics, completions, and the summary's evaluation and guards."""
    summary = json.loads((run / "summary.json").read_text())
    tables = {path.name: pyarrow.parquet.read_table(path).to_pylist() for path in sorted((run / "completions").iterdir())}
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": timeless(run),
        "completions": tables,
        "evaluations": {path.name: json.loads(path.read_text())["prompts"] for path in own_files(run)},
        "summary": {name: summary[name] for name in ("steps", "evaluation", "guards", "interrupted")},
    }
