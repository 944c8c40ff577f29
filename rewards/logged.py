"""What a reward function logs: metrics under names that the run does not use itself, and columns of plain values.

logged_name("length", "words")          # "words"
logged_name("length", "reward")         # "rewards/length/reward": `reward` is the run's own
plain(np.float32(0.5))                  # 0.5
plain({"scores": torch.zeros(2)})       # {"scores": [0.0, 0.0]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

OWN_METRICS = frozenset(
    (
        "advantage_scale",
        "entropy",
        "epoch",
        "filtered_ratio",
        "frac_reward_zero_std",
        "grad_norm",
        "kl",
        "learning_rate",
        "loss",
        "num_tokens",
        "overlong_penalty",
        "resampling_rounds",
        "reward",
        "reward_std",
        "reward_without_failures",
        "step",
        "step_time",
        "total_flos",
        "update_skipped",
        "updates",
    )
)
"""Metrics of every run by their names; `tests/grpo/test_outages_of_a_run.py` compares them with those of a run."""

OWN_PREFIXES = (
    "clip_ratio/",
    "completions/",
    "episodes/",
    "eval_",
    "guards/",
    "memory/",
    "packing/",
    "profiling/",
    "rewards/",
    "sampling/",
    "time/",
    "tokens_per_second/",
    "tools/",
    "train_",
    "workers/",
)
"""Starts of the names of all other metrics of runs, evaluations (`eval_`) and ends of runs (`train_`)."""


LogExtra = Callable[[str, Sequence[Any]], None]
"""The argument `log_extra` of a reward function."""

EXTRACTED_ANSWER = "extracted_answer"
"""Column, by the name in TRL's documentation, in which a reward function logs the answer that it found in each completion: None
if there is none. Evaluations vote on it (`eval_maj@n`)."""


def logged_name(function: str, metric: str) -> str:
    """The name under which the metric of a reward function is recorded. Those of the run get a prefix with the function's."""
    is_own = metric in OWN_METRICS or metric.startswith(OWN_PREFIXES)
    return f"rewards/{function}/{metric}" if is_own else metric


def plain(value: Any) -> Any:
    """The value in types that JSON has: scalars, arrays and tensors of any library become Python's, anything else its text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value).encode("utf-8", "replace").decode()  # half a surrogate pair is in no file
    if isinstance(value, int) and not isinstance(value, float):
        return int(value)
    if isinstance(value, float | Decimal | Fraction):
        return _as_float(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if callable(to_list := getattr(value, "tolist", None)) and not isinstance(value, type):
        return plain(to_list())  # numpy, torch, pandas
    return plain(str(value))


def _as_float(number: Any) -> float | str:
    try:
        return float(number)
    except (OverflowError, ValueError):  # ValueError: a signalling NaN
        return math.inf if number > 0 else -math.inf
