"""The prompts of each step.

    sampler = PromptSampler(data.rows, prompts_per_step=8, seed=42)
    batch = sampler.batch(step)           # depends on seed and step only

`data.sampler`, a user's function, takes the place of epochs in random order.
"""

import operator
from collections.abc import Callable, Sequence

import numpy as np

from ..config.functions import text_of
from .prompts import Prompt

UserSampler = Callable[[int, int, Sequence[Prompt]], Sequence[int]]
"""From a step, a number and all training prompts to the indices of that many prompts. It depends on its arguments only."""


class PromptSampler:
    """The prompts of each step: `batch(step)` is a pure function of the seed and the step.

    Every epoch contains each row once, in a new random order (`shuffle`) or in the order of the data. A batch may end one epoch
    and start the next. With more prompts per step than rows, a batch spans several epochs and repeats rows. Steps count
    from 0. With a `function` the rows of a step are those that it returns; only the draws of `further_batch` stay.
    """

    def __init__(
        self,
        rows: Sequence[Prompt],
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
        function: UserSampler | None = None,
    ):
        self.rows = tuple(rows)
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.function = function

    def batch(self, step: int) -> list[Prompt]:
        """The `prompts_per_step` rows of a step. Raises what `indices` raises."""
        return [self.rows[index] for index in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """The places of a step's rows in the data.

        Raises:
            ValueError: the user's function did not return that many places.
        """
        if self.function is not None:
            return self._checked(self.function(step, self.prompts_per_step, self.rows), self.function)
        size = len(self.rows)
        start = step * self.prompts_per_step
        stop = start + self.prompts_per_step
        chosen: list[int] = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            first = max(start - epoch * size, 0)
            last = min(stop - epoch * size, size)
            chosen.extend(self._order(epoch)[first:last].tolist())
        return chosen

    def further_batch(self, step: int, number: int) -> list[Prompt]:
        """Another `prompts_per_step` rows for the step, drawn at random from all rows; `number` counts these draws from 1."""
        draw = np.random.default_rng(np.random.SeedSequence([self.seed, step, number]))
        size = len(self.rows)
        indices = draw.choice(size, self.prompts_per_step, replace=size < self.prompts_per_step)
        return [self.rows[index] for index in indices]

    def _checked(self, returned: Sequence[int], function: UserSampler) -> list[int]:
        name, size = text_of(function), len(self.rows)
        try:
            indices = [operator.index(index) for index in returned]
        except TypeError as error:
            raise ValueError(f"{name} must return a list of row numbers: {error}") from error
        if len(indices) != self.prompts_per_step:
            raise ValueError(
                f"{name} must return the {self.prompts_per_step} row numbers of a step (optim.prompts_per_step), not "
                f"{len(indices)}"
            )
        outside = [index for index in indices if not 0 <= index < size]
        if outside:
            raise ValueError(f"{name} must return row numbers from 0 to {size - 1} (got {outside[0]})")
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self.rows)
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(size)
