"""The prompts of each step.

    sampler = PromptSampler(data.rows, prompts_per_step=8, seed=42)
    batch = sampler.batch(step)           # depends on seed and step only
"""

from collections.abc import Sequence

import numpy as np

from .prompts import Prompt


class PromptSampler:
    """The prompts of each step: `batch(step)` is a pure function of the seed and the step.

    Every epoch contains each row once, in a new random order (`shuffle`) or in the order of the data. A batch may end one epoch
    and start the next. With more prompts per step than rows, a batch spans several epochs and repeats rows. Steps count
    from 0.
    """

    def __init__(self, rows: Sequence[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool = True):
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
        """Another `prompts_per_step` rows for the step, drawn at random from all rows; `number` counts these draws from 1."""
        draw = np.random.default_rng(np.random.SeedSequence([self.seed, step, number]))
        size = len(self.rows)
        indices = draw.choice(size, self.prompts_per_step, replace=size < self.prompts_per_step)
        return [self.rows[index] for index in indices]

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self.rows)
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(size)
