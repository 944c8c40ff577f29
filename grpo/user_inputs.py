"""What a user passes to `GRPOTrainer` besides the configuration. On a cluster it is sent to every worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.trainer_callback import TrainerCallback

from ..rewards.loading import RewardSpec
from .data.sources import DataSource, EvalSource


@dataclass(frozen=True, kw_only=True)
class UserInputs:
    """Reward functions and data sets (None: those of the configuration), and callbacks.

    `eval_dataset` may be several data sets by name.
    """

    reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None
    train_dataset: DataSource | None = None
    eval_dataset: EvalSource | None = None
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()
