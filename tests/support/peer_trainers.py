"""Whole trainers that share their steps: what each worker process of `test_peer_runs.py` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_runs import ROWS, many_low_ids, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.peers import Peers
from rankup.grpo.silent import SilentView


def train_in_a_group(
    rank: int, size: int, rendezvous: str, model: str, output_dir: str, changes: dict[str, Any], resume: bool
) -> None:
    """One worker of `size`. Closing vLLM ends the process group too, so a process makes one run."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=many_low_ids,
        args=tiny_config(Path(output_dir), **changes),
        train_dataset=ROWS,
        eval_dataset=ROWS[:5],
        view=SilentView(),
        peers=Peers.of_process_group(),
    )
    trainer.train(resume_from_checkpoint=resume, allow_changes=resume)
