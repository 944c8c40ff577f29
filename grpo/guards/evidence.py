"""Which rewards are evidence about the policy. An outage of a reward function is none: no reward is not reward 0.

    coverage = Coverage()
    coverage.missing({"judge": 1.0, "format": 1.0})     # []: the share of the completions that each function scored
    coverage.missing({"judge": 0.0, "format": 1.0})     # ["judge"]: it usually scores all of them
    evidence(metrics, coverage)                         # the metrics without those of the reward
    coverage.note()                                     # what the user should know, once for each outage

Without a reward of one of several functions, the sum is another quantity: it falls without the judge, and rises without the
penalty. Completions on which a function failed do not count either (`reward_without_failures`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

USUAL = 0.5
"""A function that scores at least this share of the completions is missing where it scores less than half of what it usually
does. Others may apply to few rows, and a step may have none of them."""

SPAN = 20
"""Steps of the running mean of what is usual."""

OF_REWARDS = ("reward", "advantage_scale", "frac_reward_zero_std")

_FUNCTION = re.compile(r"rewards/(.*)/mean")


@dataclass(slots=True)
class Coverage:
    """The share of the completions that each reward function usually scores, by its name."""

    usual: dict[str, float] = field(default_factory=dict)
    _now: dict[str, float] = field(default_factory=dict)
    """Of the functions that are missing, the share that they score."""
    _noted: set[str] = field(default_factory=set)

    def missing(self, shares: Mapping[str, float]) -> list[str]:
        """The functions that score far fewer completions than usual; what the others score becomes usual."""
        names = [name for name, share in shares.items() if self.usual.get(name, 0.0) >= USUAL and share < self.usual[name] / 2]
        for name, share in shares.items():
            if name not in names:
                past = self.usual.get(name, share)
                self.usual[name] = past + (share - past) * 2 / (SPAN + 1)
        self._now = {name: shares[name] for name in names}
        return names

    def note(self) -> str | None:
        """What guards ignore from now on; None if nothing has changed."""
        new, self._noted = self._now.keys() - self._noted, set(self._now)
        shares = ", ".join(
            f"{name} scores {self._now[name]:.0%} of the completions, usually {self.usual[name]:.0%}" for name in sorted(new)
        )
        return f"guards ignore the reward until this is over: {shares}" if new else None


def scored_shares(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The share of the completions that each reward function with a weight scored, from the metrics of a step."""
    names = [match[1] for name in metrics if (match := _FUNCTION.fullmatch(name))]
    return {name: 1.0 - (metrics.get(f"rewards/{name}/none_ratio") or 0.0) for name in names}


def evidence(metrics: Mapping[str, float | None], coverage: Coverage) -> dict[str, float | None]:
    """The metrics of a step that say something about the policy."""
    judged = dict(metrics)
    if "reward_without_failures" in metrics:
        judged["reward"] = metrics["reward_without_failures"]
    if coverage.missing(scored_shares(metrics)):
        judged.update(dict.fromkeys((name for name in OF_REWARDS if name in judged), math.nan))
    return judged
