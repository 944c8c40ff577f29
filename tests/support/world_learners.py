"""Learners that share their steps: what each worker process of `test_world.py` runs."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from little_memory import little_memory
from sample_groups import random_groups

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.common.world import World
from rankup.grpo.config import GRPOConfig, LoraConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner

SHAPES = [(7, [5, 1, 9, 4]), (3, [3, 6]), (12, [2, 8]), (5, [4, 4, 4]), (2, [20])]
STEPS = 3
OPTIONS: dict[str, Any] = {"mode": "none", "veto": 0.0, "learning_rate": 1e-3, "guards": {"enabled": False}}

Outcome = tuple[torch.Tensor, list[dict[str, float]]]
"""All master weights in one vector, and the metrics of each step."""


def as_remote(group: Group) -> Group:
    """The group as other workers know it: lengths and advantages, no tokens."""
    return dataclasses.replace(group, completions=tuple(c.metadata() for c in group.completions), is_local=False)


def learn(
    model_path: str, variants: dict[str, dict[str, Any]], world: World, *, shard_of: World | None = None
) -> dict[str, Outcome]:
    """A few updates for each variant, on this worker's shard of the same groups. A variant may limit the tokens of a pack that
    fit the memory of the last worker ("fitting_tokens").

    shard_of: learn alone from the shard of a worker of that world.
    """
    outcomes = {}
    for name, options in variants.items():
        with quiet_stderr():
            dtype = options.get("dtype", "float32")
            policy = Policy(model_path, lora=LoraConfig(rank=8, alpha=8), dtype=dtype, seed=3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in policy.layers.values():
                layer.master_b.copy_(torch.randn(layer.master_b.shape, generator=generator) * 0.05)
        policy.write_slots()
        fitting_tokens = options.get("fitting_tokens") if world.rank == world.size - 1 else None
        options = {option: value for option, value in options.items() if option != "fitting_tokens"}
        learner = Learner(policy, GRPOConfig(**{**OPTIONS, **options}), world=world)
        metrics = []
        for step in range(STEPS):
            groups = random_groups(SHAPES, seed=step, truncated=[0])
            groups[1] = dataclasses.replace(groups[1], advantages=(0.0, 0.0))
            local = range(len(groups))[world.shard(len(groups))]
            shared = [group if place in local else as_remote(group) for place, group in enumerate(groups)]
            if shard_of is not None:
                shared = groups[shard_of.shard(len(groups))]
            with nullcontext() if fitting_tokens is None else little_memory(fitting_tokens):
                metrics.append(learner.update(shared, step=step).metrics)
            policy.write_slots()
        outcomes[name] = (torch.cat([master.detach().flatten() for master in policy.masters]), metrics)
    return outcomes


def learn_in_a_group(rank: int, size: int, rendezvous: str, model_path: str, variants: dict, out: str) -> None:
    """One worker of `size`, which leaves what it came to in `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    outcomes = learn(model_path, variants, World.from_process_group())
    torch.save(outcomes, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


