"""Sums and extremes over a step's tokens, first over the packs of one worker, then over all workers.

    tally = Tally.of(sums={"entropy": entropy_N}, extremes={"ratio": ratio_N})
    total = Tally.merge([tally, *others])
    total.mean("entropy"), total.highest["ratio"]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums, lowest and highest values over `count` tokens, by name, as Python floats."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(*, sums: Mapping[str, torch.Tensor], extremes: Mapping[str, torch.Tensor]) -> Tally:
        """The tally of values [N] by name; N is the same for all, at least 1. Sums are accumulated in fp64."""
        count = len(next(iter(sums.values())))
        # One transfer for all of them.
        values = torch.stack(
            [
                *(value_N.sum(dtype=torch.float64) for value_N in sums.values()),
                *(value_N.min().double() for value_N in extremes.values()),
                *(value_N.max().double() for value_N in extremes.values()),
            ]
        ).tolist()
        totals, rest = values[: len(sums)], values[len(sums) :]
        lowest, highest = rest[: len(extremes)], rest[len(extremes) :]
        return Tally(
            count,
            dict(zip(sums, totals, strict=True)),
            dict(zip(extremes, lowest, strict=True)),
            dict(zip(extremes, highest, strict=True)),
        )

    @staticmethod
    def merge(tallies: Iterable[Tally]) -> Tally:
        """One tally of all tokens. Exact sums: every worker that merges the same parts gets the same floats."""
        parts = [tally for tally in tallies if tally.count]
        names = parts[0] if parts else Tally()
        return Tally(
            sum(part.count for part in parts),
            {name: math.fsum(part.sums[name] for part in parts) for name in names.sums},
            {name: min(part.lowest[name] for part in parts) for name in names.lowest},
            {name: max(part.highest[name] for part in parts) for name in names.highest},
        )

    def join(self, other: Tally) -> Tally:
        """Add further values of the same tokens."""
        assert self.count == other.count
        return Tally(self.count, self.sums | other.sums, self.lowest | other.lowest, self.highest | other.highest)

    def mean(self, name: str) -> float:
        """Mean over the tokens."""
        return self.sums[name] / self.count
