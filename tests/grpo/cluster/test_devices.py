"""What workers do before they load anything; here without Ray, in a process group of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed as dist

from rankup.grpo.cluster.devices import prepare_device


class LocalRank:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def get_local_rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_gpus_are_connected_and_the_cache_is_the_worker_s_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_gpu: bool
) -> None:
    reduced: list[torch.Tensor] = []
    ones, all_reduce = torch.ones, dist.all_reduce

    def counted(tensor: torch.Tensor) -> Any:
        reduced.append(tensor)
        return all_reduce(tensor)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(dist, "all_reduce", counted)
    monkeypatch.setattr(ray.train, "get_context", lambda: LocalRank(1))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        prepare_device()
    finally:
        dist.destroy_process_group()
    assert len(reduced) == has_gpu
    assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path / "worker_1")
