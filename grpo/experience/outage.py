"""How long a run goes on while no reward function gives a reward, or environments fail.

outage = Outage(config.rewards)
outage.stop_if_too_long(batch)      # after every step
"""

from __future__ import annotations

from ...rewards.config import RewardsConfig
from ..common.errors import TrainingStoppedError
from .batch import Batch
from .episode_metrics import void_failures
from .step_metrics import has_reward


class Outage:
    """Counts the steps in a row without any reward. It starts from 0 when a run resumes."""

    def __init__(self, config: RewardsConfig) -> None:
        self._limit = config.max_steps_without_reward
        self._steps = 0

    def stop_if_too_long(self, batch: Batch) -> None:
        """Raise TrainingStoppedError if this step is the last one that may have no reward, or if more than half of its episodes
        are void. All workers decide alike."""
        _stop_if_most_are_void(batch)
        self._steps = 0 if any(has_reward(group) for group in batch.groups) else self._steps + 1
        if self._limit is not None and self._steps >= self._limit:
            names = ", ".join(batch.groups[0].scores.by_function) or "none"
            raise TrainingStoppedError(
                f"stopping after {self._steps} steps in a row in which no completion had a reward (functions: {names}). They "
                "have not changed the policy. Resume the run when the functions answer again, or raise "
                "rewards.max_steps_without_reward"
            )


def _stop_if_most_are_void(batch: Batch) -> None:
    failures = void_failures(batch.groups)
    count = sum(completion.episode is not None for group in batch.groups for completion in group.completions)
    if 2 * len(failures) > count:
        raise TrainingStoppedError(
            f"stopping after a step in which {len(failures)} of {count} episodes are void: their environment failed, and "
            f"nothing is learned from them. Resume the run when it works again. The last failure:\n{failures[-1]}"
        )
