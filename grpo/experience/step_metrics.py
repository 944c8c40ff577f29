"""Metrics of one step's completions by TRL's names, and the table of its completions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rollout.types import Completion
from ..data.groups import Group
from .episode_metrics import episode_columns, episode_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsTable:
    """Columns with one value for each completion.

    Attributes:
        table: prompt, completion, completion_ids, logprobs, advantage, reward, finish_reason, num_tokens, policy_version; of
            episodes also messages, tool_calls, sampled_spans, num_given, failure. `logprobs` has a place for each of
            `completion_ids`: the sampler's log-probability, None for a given token.
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

    A mean is NaN where there is no reward: that is not reward 0. `advantage_scale` is the spread in the groups that have one:
    the scale of advantages before anything divides them. `rewards/<name>/none_ratio` is the share of the completions to which a
    function with a weight gave no reward, and `reward_without_failures` the mean reward of those on which no function failed;
    both exist only where there are such completions. Void episodes count in none of them.
    """
    groups = [g.without_void() for g in groups]
    scored = [g for g in groups if has_reward(g)]
    metrics = {
        "reward": _mean(reward for g in groups for reward in g.scores.total),
        "reward_std": _mean(g.reward_std for g in scored),
        "frac_reward_zero_std": _mean(float(not g.has_variance) for g in scored),
        "advantage_scale": _mean((g.reward_std for g in scored if g.has_variance), of_none=0.0 if scored else math.nan),
    }
    for name in dict.fromkeys([*function_names, *groups[0].scores.by_function]):  # environments give rewards too
        values = [reward for g in groups for reward in g.scores.by_function[name] if reward is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0 if values else math.nan
    count = sum(len(g.completions) for g in groups)
    for name, share in scored_shares(groups).items():
        if share < 1.0:
            metrics[f"rewards/{name}/none_ratio"] = 1.0 - share
    for name, reasons in failures(groups).items():
        metrics[f"rewards/{name}/failed_ratio"] = len(reasons) / count
    if any(g.scores.errors for g in groups):
        metrics["reward_without_failures"] = _mean(reward for g in groups for reward in _without_failures(g))
    for name in dict.fromkeys(name for g in groups for name in g.scores.metrics):
        metrics[name] = _mean(g.scores.metrics.get(name) for g in groups)
    return metrics


def has_reward(group: Group) -> bool:
    """Whether any completion of the group has a reward."""
    return any(reward is not None for reward in group.scores.total)


def scored_shares(groups: Sequence[Group]) -> dict[str, float]:
    """The share of the completions that each function scored itself, by its name; without functions of weight 0.

    Void episodes, which no function sees, do not count.
    """
    shares: dict[str, float] = {}
    groups = [g.without_void() for g in groups]
    for name, weight in zip(groups[0].scores.by_function, groups[0].scores.weights, strict=True):
        rewards = [reward for g in groups for reward in g.scores.by_function[name]]
        errors = [error for g in groups for error in g.scores.errors.get(name) or [None] * len(g.completions)]
        if weight != 0.0:
            pairs = zip(rewards, errors, strict=True)
            scored = [reward is not None and error is None for reward, error in pairs]
            if scored:
                shares[name] = sum(scored) / len(scored)
    return shares


def _without_failures(group: Group) -> list[float | None]:
    """The rewards of the completions on which no function failed."""
    failed = [any(errors) for errors in zip(*group.scores.errors.values(), strict=True)] or [False] * len(group.completions)
    return [None if is_failed else reward for reward, is_failed in zip(group.scores.total, failed, strict=True)]


def failures(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Why functions failed, by function: one reason for each completion."""
    names = dict.fromkeys(name for g in groups for name in g.scores.errors)
    return {name: [r for g in groups for r in g.scores.errors.get(name, []) if r is not None] for name in names}


def completion_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths in sampled tokens and the share of truncated completions, without void episodes; those of episodes."""
    completions = [completion for group in groups for completion in group.completions if not completion.is_void]
    lengths = [completion.num_tokens for completion in completions]
    terminated = [completion.num_tokens for completion in completions if completion.finish_reason in ("stop", "done")]
    of_terminated = terminated or [0]  # TRL's value if there is none
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths, default=math.nan)),
        "completions/max_length": float(max(lengths, default=math.nan)),
        "completions/mean_terminated_length": _mean(of_terminated),
        "completions/min_terminated_length": float(min(of_terminated)),
        "completions/max_terminated_length": float(max(of_terminated)),
        "completions/clipped_ratio": 1.0 - len(terminated) / len(completions) if completions else math.nan,
        **episode_metrics(groups),
    }


def completions_table(groups: Sequence[Group]) -> CompletionsTable:
    """The table of these groups' completions."""
    pairs = [(group, completion) for group in groups for completion in group.completions]
    table = {
        "prompt": [g.prompt.content for g, _ in pairs],
        "completion_prefix": [g.prompt.completion_prefix for g, _ in pairs],
        "completion": [c.text for _, c in pairs],
        "completion_ids": [list(c.token_ids) for _, c in pairs],
        "logprobs": [_by_place(c) for _, c in pairs],
        "advantage": [advantage for g in groups for advantage in g.advantages],
        "reward": [reward for g in groups for reward in g.scores.total],
        "finish_reason": [c.finish_reason for _, c in pairs],
        "num_tokens": [c.num_tokens for _, c in pairs],
        "policy_version": [c.policy_version for _, c in pairs],
        **episode_columns([c for _, c in pairs]),
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


def _by_place(completion: Completion) -> list[float | None]:
    """The log-probability of each of its tokens; None for a given one."""
    logprobs: list[float | None] = [None] * len(completion.token_ids)
    for place, logprob in zip(completion.sampled, completion.logprobs, strict=True):
        logprobs[place] = logprob
    return logprobs


def _mean(values: Iterable[float | None], *, of_none: float = math.nan) -> float:
    """Mean of the known values; `of_none` if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else of_none
