"""Three scored groups, and what each of several workers comes to that calls functions on its part of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rankup.grpo.common.world import World
from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.experience.user_functions import filtered, user_advantages
from rankup.rewards.combining import Scores
from rankup.rollout.types import Completion


def scored_group(prompt: Sequence[int], text: str, rewards: list[float | None]) -> Group:
    """A group of completions of two tokens with this text."""
    completion = Completion(token_ids=(7, 8), logprobs=(-1.0, -1.0), text=text, finish_reason="stop", policy_version=0)
    scores = Scores(total=rewards, by_function={"mine": rewards}, extras={}, metrics={}, weights=[1.0])
    return Group(prompt=Prompt("", tuple(prompt)), completions=(completion,) * len(rewards), scores=scores)


GROUPS = [
    scored_group([5], "a", [1.0, 0.0, 0.5]),
    scored_group([5, 6], "bb", [1.0, 0.0, None]),
    scored_group([5, 6, 7], "ccc", [0.25, 0.25, 0.25]),
]


def length_of_the_first_text(groups: Sequence[Group]) -> list[list[float]]:
    """0 for groups of other workers, which have no text."""
    return [[float(len(group.completions[0].text)), 0.0, 0.0] for group in groups]


def has_a_long_text(group: Group) -> bool:
    """False for groups of other workers."""
    return len(group.completions[0].text) > 1


def call_in_a_group(rank: int, size: int, rendezvous: str, out: str) -> None:
    """One worker of `size`, which leaves what it came to in `out`."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    world = World.from_process_group()
    local = range(len(GROUPS))[world.shard(len(GROUPS))]
    groups = [
        group
        if place in local
        else dataclasses.replace(group, completions=tuple(c.metadata() for c in group.completions), is_local=False)
        for place, group in enumerate(GROUPS)
    ]
    rows = user_advantages(length_of_the_first_text, groups, world)
    passing = [group.passes_filter for group in filtered(has_a_long_text, groups, world)]
    torch.save((rows, passing, [group.is_local for group in groups]), Path(out) / f"{rank}.pt")
    dist.destroy_process_group()
