"""What an evaluation estimates about the policy, each with its interval: mean reward, pass@k, maj@n.

    estimates = estimates_of(groups, pass_reward=1.0)
    estimates["reward"], estimates["pass@4"]        # Estimate(mean=0.41, low=0.35, high=0.47), ...

`grpo/algorithm/estimates.py` has the formulas and how intervals are made.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Hashable, Sequence
from typing import Any

from ...rewards.logged import EXTRACTED_ANSWER
from ..algorithm.estimates import Estimate, majority_at_k, mean_interval, pass_at_k
from ..data.groups import Group


def prompt_rewards(groups: Sequence[Group]) -> list[float | None]:
    """The mean reward of each prompt's completions, without those that have none; None for a prompt without any."""
    known = [_known(group.scores.total) for group in groups]
    return [statistics.fmean(rewards) if rewards else None for rewards in known]


def estimates_of(groups: Sequence[Group], *, pass_reward: float) -> dict[str, Estimate]:
    """The estimates by name: `reward`; with several completions of a prompt also `pass@k` for k of 1, 2, 4, ... and all n, and
    `maj@n` if the reward functions log the answers of all completions that they score.

    A completion without a reward counts in none of them but the vote of `maj@n`, where it does not pass.
    """
    rewards = [reward for group in groups for reward in group.scores.total if reward is not None]
    means = [mean for mean in prompt_rewards(groups) if mean is not None]
    # The mean over completions, as TRL has it: that over prompts differs if some completions have no reward.
    estimates = {"reward": _estimate(means, mean=statistics.fmean(rewards) if rewards else math.nan)}
    count = max(len(group.completions) for group in groups)
    if count == 1:
        return estimates
    for k in attempts(count):
        counted = [known for group in groups if len(known := _known(group.scores.total)) >= k]
        shares = [pass_at_k(len(known), sum(reward >= pass_reward for reward in known), k) for known in counted]
        estimates[f"pass@{k}"] = _estimate(shares)
    scored = [group for group in groups if _known(group.scores.total)]
    if scored and all(EXTRACTED_ANSWER in group.scores.extras for group in scored):
        estimates[f"maj@{count}"] = _estimate([_majority(group, pass_reward) for group in scored])
    return estimates


def attempts(count: int) -> list[int]:
    """The k of pass@k for that many completions: 1, 2, 4, ..., and all of them."""
    powers = [2**exponent for exponent in range(count.bit_length()) if 2**exponent <= count]
    return powers if powers[-1] == count else [*powers, count]


def _majority(group: Group, pass_reward: float) -> float:
    """maj@n of a prompt with n completions."""
    answers = [_as_key(answer) for answer in group.scores.extras[EXTRACTED_ANSWER]]
    passes = [reward is not None and reward >= pass_reward for reward in group.scores.total]
    return majority_at_k(answers, passes, len(passes))


def _as_key(answer: Any) -> Hashable | None:
    """A logged value, which is plain, as something to count."""
    return json.dumps(answer, sort_keys=True) if isinstance(answer, list | dict) else answer


def _estimate(values: Sequence[float], *, mean: float | None = None) -> Estimate:
    """Of one value for each prompt. `mean`: if it is not that of the values."""
    if not values:
        return Estimate(mean=math.nan, low=math.nan, high=math.nan)
    interval = mean_interval(values)
    mean = statistics.fmean(values) if mean is None else mean
    return Estimate(mean=mean, low=min(interval.low, mean), high=max(interval.high, mean))


def _known(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]
