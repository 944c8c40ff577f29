"""Metrics and tables of one step's completions, under TRL's names."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ...rewards.runner import Scorer
from ..algorithm.advantages import GroupAdvantages
from .collect import ScoredGroup


def reward_metrics(groups: Sequence[ScoredGroup], advantages: Sequence[GroupAdvantages], scorer: Scorer) -> dict[str, float]:
    """Mean reward, its spread within groups, each function's own statistics, and what the functions logged.

    `advantage_scale` is the spread in the groups that have one: what advantages are before anything divides them.
    """
    metrics = {
        "reward": _mean(r for g in groups for r in g.scores.total),
        "reward_std": _mean(a.std for a in advantages),
        "frac_reward_zero_std": _mean(float(not a.has_variance) for a in advantages),
        "advantage_scale": _mean(a.std for a in advantages if a.has_variance),
    }
    for name in scorer.names:
        values = [r for g in groups for r in g.scores.by_function[name] if r is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    for name, reasons in failures(groups).items():
        metrics[f"rewards/{name}/failed_ratio"] = len(reasons) / sum(len(g.group.completions) for g in groups)
    for name in dict.fromkeys(name for g in groups for name in g.scores.metrics):
        metrics[name] = _mean(g.scores.metrics.get(name) for g in groups)
    return metrics


def failures(groups: Sequence[ScoredGroup]) -> dict[str, list[str]]:
    """Why functions that failed gave rows no reward of their own, a reason a row."""
    names = dict.fromkeys(name for g in groups for name in g.scores.errors)
    return {name: [r for g in groups for r in g.scores.errors.get(name, []) if r is not None] for name in names}


def completion_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Lengths in tokens and the share of completions that were cut off."""
    completions = [c for g in groups for c in g.group.completions]
    lengths = [c.num_tokens for c in completions]
    finished = [c.num_tokens for c in completions if c.finish_reason == "stop"]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": _mean(finished),
        "completions/clipped_ratio": 1.0 - len(finished) / len(completions),
    }


def completions_table(
    groups: Sequence[ScoredGroup], advantages: Sequence[GroupAdvantages], scorer: Scorer
) -> tuple[dict[str, list[Any]], dict[str, dict[str, list[Any]]]]:
    """For `RunRecorder.completions`: the table; and `rewards` (a column a function), `extras` (what functions logged), `data`.

    `<function>/error` says why a row has no reward of a function that failed.
    """
    pairs = [(g, c) for g in groups for c in g.group.completions]
    table = {
        "prompt": [g.row.prompt for g, _ in pairs],
        "completion": [c.text for _, c in pairs],
        "completion_ids": [list(c.token_ids) for _, c in pairs],
        "advantage": [a for group in advantages for a in group.advantages],
        "reward": [r for g in groups for r in g.scores.total],
        "finish_reason": [c.finish_reason for _, c in pairs],
        "num_tokens": [c.num_tokens for _, c in pairs],
        "policy_version": [c.policy_version for _, c in pairs],
    }
    rewards = {name: [r for g in groups for r in g.scores.by_function[name]] for name in scorer.names}
    names = dict.fromkeys(name for g in groups for name in g.scores.extras)
    extras = {
        name: [v for g in groups for v in g.scores.extras.get(name, [None] * len(g.group.completions))] for name in names
    }
    for function in failures(groups):
        extras[f"{function}/error"] = [
            reason for g in groups for reason in g.scores.errors.get(function) or [None] * len(g.group.completions)
        ]
    data = {name: [g.row.columns[name] for g, _ in pairs] for name in groups[0].row.columns}
    return table, {"rewards": rewards, "extras": extras, "data": data}


def _mean(values: Iterable[float | None]) -> float:
    """Mean of what is known; 0 where nothing is."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else 0.0
