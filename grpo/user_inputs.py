"""What a user passes to `GRPOTrainer` besides the configuration. On a cluster it is sent to every worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..rewards.loading import RewardSpec
from .config import GRPOConfig
from .data.run_inputs import read_streams
from .data.sources import DataSource, EvalSource
from .episodes.actions import EpisodeTools
from .episodes.environments import EnvironmentFactories
from .episodes.rollout_func import RolloutFunc, of_trainer

__all__ = ["DataSource", "EnvironmentFactories", "EpisodeTools", "EvalSource", "RolloutFunc", "UserInputs", "of_trainer"]


@dataclass(frozen=True, kw_only=True)
class UserInputs:
    """Reward functions, data sets, tools and environments (None: those of the configuration), and callbacks.

    `eval_dataset` may be several data sets by name, and `eval_reward_funcs` are the functions of those that have their own.
    """

    reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None
    eval_reward_funcs: Mapping[str, Sequence[RewardSpec]] | None = None
    train_dataset: DataSource | None = None
    eval_dataset: EvalSource | None = None
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()
    tools: EpisodeTools | None = None
    environment_factory: EnvironmentFactories | None = None
    rollout_func: Callable[[list[Any]], Mapping[str, Any]] | None = None

    def without_streams(self, config: GRPOConfig) -> UserInputs:
        """The same with the rows of streams in their place: a stream could be read only once, or differently by each worker.

        Raises:
            ValueError: the length of the run is given in epochs, and the training data has no length.
        """
        train_dataset, eval_dataset = read_streams(config, self.train_dataset, self.eval_dataset)
        return replace(self, train_dataset=train_dataset, eval_dataset=eval_dataset)
