"""Completions to score, and reward functions with known answers and known faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from rankup.rewards.config import RewardFunction, RewardsConfig
from rankup.rewards.contract import Inputs
from rankup.rewards.loading import RewardSpec
from rankup.rewards.runner import Scorer

Given = RewardSpec | RewardFunction


def scorer_of(functions: Given | Sequence[Given], **options: Any) -> Scorer:
    """A scorer of these functions; `options` are those of `RewardsConfig`."""
    return Scorer(RewardsConfig(**options), functions)


def inputs(*completions: str | list[dict[str, str]], **columns: list) -> Inputs:
    return Inputs(
        prompts=["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[1] * len(c) for c in completions],
        columns=columns,
        trainer_state={"global_step": 3},
    )


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def obeys(completions, **kwargs):
    """Does what each completion says: the faults of these tests."""
    for completion in completions:
        verb, _, argument = completion.partition(" ")
        if verb == "sleep":
            time.sleep(float(argument))
        elif verb == "raise":
            raise KeyError(argument)
        elif verb == "exit":
            print("on its way out")
            os._exit(int(argument))
        elif verb == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif verb == "allocate":
            bytearray(int(argument) * 2**20)
    return [1.0] * len(completions)


class UnreadableError(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, one, two):
        super().__init__("text")
