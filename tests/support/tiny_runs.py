"""Complete runs of a tiny model, for tests: rows, a reward with variance, a configuration of seconds, and what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankup import GRPOConfig

ROWS = [{"prompt": f"count to {n}", "target": n} for n in range(12)]

OPTIONS: dict[str, Any] = {
    "engine": "torch",  # starts in milliseconds; tests of vLLM change it
    "dtype": "float32",
    "rank": 8,
    "alpha": 16,
    "num_generations": 4,
    "max_prompt_length": 64,
    "max_completion_length": 8,
    "prompts_per_step": 3,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "kv_cache_gib": 0.0625,
}


def tiny_config(output_dir: Path, **changes: Any) -> GRPOConfig:
    """A configuration of two steps of three prompts, with flat names changed."""
    values: dict[str, Any] = {**OPTIONS, "output_dir": output_dir, **changes}
    return GRPOConfig(**values)


def many_low_ids(completions: list, completion_ids: list, target: list, log_metric: Any, **kwargs: Any) -> list[float]:
    """A reward with variance: the share of token ids in the lower half of the vocabulary."""
    log_metric("targets", sum(target))
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Those of its steps."""
    return [row for row in metrics_of(run) if "reward" in row]


def timeless(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` without what no two runs share: times, speeds and memory."""
    of_this_run = ("time/", "tokens_per_second/", "memory/", "workers/", "eval_runtime", "eval_samples_per_second")
    of_tools = ("episodes/tool_seconds", "eval_episodes/tool_seconds")
    left_out = (*of_this_run, *of_tools)
    return [{name: value for name, value in row.items() if not name.startswith(left_out)} for row in metrics_of(run)]
