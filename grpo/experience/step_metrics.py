"""Metrics of one step's completions by TRL's names, and the table of its completions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.groups import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsTable:
    """Columns with one value for each completion.

    Attributes:
        table: prompt, completion, completion_ids, advantage, reward, finish_reason, num_tokens, policy_version.
        rewards: by function, None where it did not apply.
        extras: values that the functions logged. `<function>/error` says why a function that failed gave no reward.
        data: the data set's columns.
    """

    table: Mapping[str, Sequence[Any]]
    rewards: Mapping[str, Sequence[float | None]]
    extras: Mapping[str, Sequence[Any]]
    data: Mapping[str, Sequence[Any]]


def reward_metrics(groups: Sequence[Group], function_names: Sequence[str]) -> dict[str, float]:
    """Mean reward, its spread within groups, each function's statistics, and the metrics that the functions logged.

    `advantage_scale` is the spread in the groups that have one: the scale of advantages before anything divides them.
    """
    metrics = {
        "reward": _mean(reward for g in groups for reward in g.scores.total),
        "reward_std": _mean(g.reward_std for g in groups),
        "frac_reward_zero_std": _mean(float(not g.has_variance) for g in groups),
        "advantage_scale": _mean(g.reward_std for g in groups if g.has_variance),
    }
    for name in function_names:
        values = [reward for g in groups for reward in g.scores.by_function[name] if reward is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    for name, reasons in failures(groups).items():
        metrics[f"rewards/{name}/failed_ratio"] = len(reasons) / sum(len(g.completions) for g in groups)
    for name in dict.fromkeys(name for g in groups for name in g.scores.metrics):
        metrics[name] = _mean(g.scores.metrics.get(name) for g in groups)
    return metrics


def failures(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Why functions failed, by function: one reason for each completion."""
    names = dict.fromkeys(name for g in groups for name in g.scores.errors)
    return {name: [r for g in groups for r in g.scores.errors.get(name, []) if r is not None] for name in names}


def completion_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths in tokens and the share of truncated completions."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [completion.num_tokens for completion in completions]
    terminated = [completion.num_tokens for completion in completions if completion.finish_reason == "stop"]
    of_terminated = terminated or [0]  # TRL's value if there is none
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": _mean(terminated),
        "completions/min_terminated_length": float(min(of_terminated)),
        "completions/max_terminated_length": float(max(of_terminated)),
        "completions/clipped_ratio": 1.0 - len(terminated) / len(completions),
    }


def completions_table(groups: Sequence[Group]) -> CompletionsTable:
    """The table of these groups' completions."""
    pairs = [(group, completion) for group in groups for completion in group.completions]
    table = {
        "prompt": [g.prompt.content for g, _ in pairs],
        "completion_prefix": [g.prompt.completion_prefix for g, _ in pairs],
        "completion": [c.text for _, c in pairs],
        "completion_ids": [list(c.token_ids) for _, c in pairs],
        "advantage": [advantage for g in groups for advantage in g.advantages],
        "reward": [reward for g in groups for reward in g.scores.total],
        "finish_reason": [c.finish_reason for _, c in pairs],
        "num_tokens": [c.num_tokens for _, c in pairs],
        "policy_version": [c.policy_version for _, c in pairs],
    }
    rewards = {name: [r for g in groups for r in g.scores.by_function[name]] for name in groups[0].scores.by_function}
    names = dict.fromkeys(name for g in groups for name in g.scores.extras)
    extras = {name: [v for g in groups for v in g.scores.extras.get(name, [None] * len(g.completions))] for name in names}
    for function in failures(groups):
        extras[f"{function}/error"] = [
            reason for g in groups for reason in g.scores.errors.get(function) or [None] * len(g.completions)
        ]
    data = {name: [g.prompt.columns[name] for g, _ in pairs] for name in groups[0].prompt.columns}
    return CompletionsTable(table=table, rewards=rewards, extras=extras, data=data)


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the known values; 0 if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else 0.0
