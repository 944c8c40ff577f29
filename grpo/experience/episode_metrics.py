"""Metrics of a step's episodes: their tools by TRL's names, turns, and failures; and their columns in the completions table.

    episode_metrics(groups)         # {"tools/call_frequency": 1.5, ..., "episodes/mean_turns": 2.2}; {} without episodes
    episode_columns(completions)    # {"messages": [[{"role": "assistant", ...}, ...], ...], "tool_calls": ...}; the same
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...rewards.logged import plain
from ...rollout.types import CallError, Completion
from ..data.groups import Group

ERRORS: dict[str, tuple[CallError, ...]] = {
    "tools/unknown": ("unknown", "arguments"),
    "tools/malformed": ("malformed",),
    "tools/timeout": ("timeout",),
}
"""Shares of the calls that ended with these errors."""


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Calls per completion, and the share of them that failed (TRL's names); shares of calls that name no tool or have wrong
    arguments, that do not parse, and that were out of time; the share of episodes that are void. Of the others: turns, given
    tokens, tokens that the engine computed again for a later turn, and seconds in which they waited for tools, on average.
    """
    completions = [completion for group in groups for completion in group.completions if completion.episode is not None]
    if not completions:
        return {}
    episodes = [completion.episode for completion in completions if completion.episode is not None]
    errors = [call.error for episode in episodes for call in episode.calls]
    valid = [(completion, episode) for completion, episode in zip(completions, episodes, strict=True) if not completion.is_void]
    return {
        "tools/call_frequency": len(errors) / sum(len(group.completions) for group in groups),
        "tools/failure_frequency": _share([error is not None for error in errors]),
        **{name: _share([error in of_name for error in errors]) for name, of_name in ERRORS.items()},
        "episodes/failed": 1.0 - len(valid) / len(completions),
        "episodes/mean_turns": _mean([episode.turns for _, episode in valid]),
        "episodes/mean_given_tokens": _mean([completion.num_given for completion, _ in valid]),
        "episodes/mean_recomputed_tokens": _mean([episode.recomputed_tokens for _, episode in valid]),
        "episodes/tool_seconds": _mean([episode.seconds_waiting for _, episode in valid]),
    }


def episode_columns(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """Messages, calls and failures of the episodes, which of their tokens were sampled, and how many were not."""
    episodes = [completion.episode for completion in completions]
    if all(episode is None for episode in episodes):
        return {}
    return {
        "messages": [None if episode is None else plain(episode.messages) for episode in episodes],
        "tool_calls": [None if episode is None else plain([asdict(call) for call in episode.calls]) for episode in episodes],
        "sampled_spans": [[list(span) for span in completion.spans] for completion in completions],
        "num_given": [completion.num_given for completion in completions],
        "failure": [None if episode is None else plain(episode.failure) for episode in episodes],
    }


def void_failures(groups: Sequence[Group]) -> list[str]:
    """Why episodes are void, with their tracebacks, in order."""
    episodes = [completion.episode for group in groups for completion in group.completions]
    return [episode.failure for episode in episodes if episode is not None and episode.failure is not None]


def _share(values: Sequence[bool]) -> float:
    """Of the values that are true; 0 if there are none, as in TRL."""
    return sum(values) / len(values) if values else 0.0


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
