"""Which prompts a step trains on.

    sampler = PromptSampler(data.rows, prompts_per_step=8, seed=42)
    batch = sampler.batch(step)           # the same prompts for the same step, whatever was asked before
"""

from collections.abc import Sequence

import numpy as np

from .prompts import Prompt


class PromptSampler:
    """Which prompts a step trains on: `batch(step)` depends on the seed and the step, and on nothing else.

    The rows are walked through in epochs; every epoch holds each row once, in an order of its own (`shuffle`) or as
    given. A batch may end one epoch and begin the next, and with more prompts in a step than there are rows it holds
    several epochs, so a row can occur twice in it. Steps count from 0.
    """

    def __init__(self, rows: Sequence[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool = True):
        if not rows:
            raise ValueError("no prompts to sample from")
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step must be at least 1, not {prompts_per_step}")
        self.rows = rows
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle

    def batch(self, step: int) -> list[Prompt]:
        """The `prompts_per_step` rows of a step."""
        size = len(self.rows)
        start = step * self.prompts_per_step
        stop = start + self.prompts_per_step
        chosen: list[Prompt] = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            first = max(start - epoch * size, 0)
            last = min(stop - epoch * size, size)
            chosen.extend(self.rows[index] for index in self._order(epoch)[first:last])
        return chosen

    def further_batch(self, step: int, number: int) -> list[Prompt]:
        """As many further rows for the step, drawn at random beside the epochs; `number` counts such draws from 1."""
        draw = np.random.default_rng(np.random.SeedSequence([self.seed, step, number]))
        size = len(self.rows)
        indices = draw.choice(size, self.prompts_per_step, replace=size < self.prompts_per_step)
        return [self.rows[index] for index in indices]

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self.rows)
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(size)
