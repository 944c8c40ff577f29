"""A user's functions on the prompts and groups of a step: loaded once before a run starts, and their results checked.

    functions = UserFunctions.load(config)
    rows = user_advantages(center, groups, world)           # center: functions.advantages
    groups = filtered(keep, groups, world)                  # keep: functions.group_filter

With several workers, each of them calls the functions. It holds tokens and texts of its local groups, which it has sampled, and
metadata of all others. The results for a group are those of the worker where it is local, so all workers decide alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ...rewards.own_code import code_of
from ..common.world import World
from ..config import GRPOConfig
from ..config.functions import load_function, text_of
from ..data.groups import Group
from ..data.sampler import UserSampler

T = TypeVar("T")

CODE = "code of functions"
"""The input of a run that has the hashes of the functions in a user's own files, for a resumed run to compare."""

UserAdvantages = Callable[[Sequence[Group]], Sequence[Sequence[float]]]
"""From the groups of a step to their advantages, one for each completion, in order."""

UserGroupFilter = Callable[[Group], bool]
"""Whether a group, which has its advantages, is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserFunctions:
    """The functions of `algorithm.advantage_estimator`, `algorithm.group_filter` and `data.sampler`, or None."""

    advantages: UserAdvantages | None = None
    group_filter: UserGroupFilter | None = None
    sampler: UserSampler | None = None

    @staticmethod
    def load(config: GRPOConfig) -> UserFunctions:
        """The functions of a configuration. `algorithm.loss_type` is checked too; `Objective` loads it.

        Raises:
            ValueError, FileNotFoundError: a function cannot be loaded, or is none.
        """
        algorithm = config.algorithm
        if algorithm.custom_loss is not None:
            load_function("algorithm.loss_type", algorithm.custom_loss)
        advantages, keep, sample = algorithm.custom_advantages, algorithm.group_filter, config.data.sampler
        return UserFunctions(
            advantages=None if advantages is None else load_function("algorithm.advantage_estimator", advantages),
            group_filter=None if keep is None else load_function("algorithm.group_filter", keep),
            sampler=None if sample is None else load_function("data.sampler", sample),
        )

    @staticmethod
    def code(config: GRPOConfig) -> dict[str, str]:
        """Hashes of the code of a configuration's functions, for a resumed run to compare. Raises what `load` raises."""
        algorithm = config.algorithm
        functions = (algorithm.custom_loss, algorithm.custom_advantages, algorithm.group_filter, config.data.sampler)
        return {name: digest for one in functions if one is not None for name, digest in code_of(one).items()}


NO_FUNCTIONS = UserFunctions()


def user_advantages(function: UserAdvantages, groups: Sequence[Group], world: World) -> list[tuple[float, ...]]:
    """The advantages of every group, as the function computes them.

    Raises:
        ValueError: not one finite number for each completion, or another one than 0 for a completion without a reward.
    """
    name = text_of(function)
    returned = function(tuple(groups))
    try:
        rows = [tuple(float(advantage) for advantage in row) for row in returned]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must return a list of numbers for each group: {error}") from error
    if len(rows) != len(groups):
        raise ValueError(f"{name} must return a list of numbers for each of the {len(groups)} groups (got {len(rows)} lists)")
    local: dict[int, tuple[float, ...]] = {}
    for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
        problem = _problem(row, group.scores.total)
        if problem is not None:
            raise ValueError(f"{name}: {problem} in group {index}, whose rewards are {group.scores.total}")
        if group.is_local:
            local[index] = row
    return _gathered(local, world)


def filtered(function: UserGroupFilter, groups: Sequence[Group], world: World) -> list[Group]:
    """The groups with `passes_filter` as the function decides. Each worker calls it for its local groups only.

    Raises:
        ValueError: it returns neither True nor False.
    """
    local: dict[int, bool] = {}
    for index, group in enumerate(groups):
        if not group.is_local:
            continue
        passes_filter = function(group)
        if not isinstance(passes_filter, bool | np.bool_):
            raise ValueError(f"{text_of(function)} must return True or False (got {passes_filter!r})")
        local[index] = bool(passes_filter)
    kept = _gathered(local, world)
    return [dataclasses.replace(group, passes_filter=passes_filter) for group, passes_filter in zip(groups, kept, strict=True)]


def _problem(advantages: Sequence[float], rewards: Sequence[float | None]) -> str | None:
    """What is wrong with the advantages of a group; None if nothing is."""
    if len(advantages) != len(rewards):
        return f"{len(advantages)} advantages for {len(rewards)} completions"
    for place, (advantage, reward) in enumerate(zip(advantages, rewards, strict=True)):
        if not math.isfinite(advantage):
            return f"the advantage of completion {place} is {advantage:g}, not a finite number,"
        if reward is None and advantage != 0.0:
            return f"completion {place} has no reward, so its advantage must be 0 (got {advantage:g})"
    return None


def _gathered(local: Mapping[int, T], world: World) -> list[T]:
    """The values of all groups in order, each from the worker where the group is local."""
    found = {index: value for part in world.all_gather(local) for index, value in part.items()}
    return [found[index] for index in range(len(found))]
