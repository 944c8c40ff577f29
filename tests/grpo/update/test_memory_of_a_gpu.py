"""Memory of a GPU that runs out, and what is measured of it. Runs on a GPU, or on the null device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.config import GRPOConfig, LoraConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.kernels.cuda_memory import peak_memory, use_expandable_segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(8, [100] * 4), (8, [100] * 4)]
OPTIONS: dict[str, Any] = {"mode": "none", "veto": 0.0, "guards": {"enabled": False}, "adam_epsilon": 1e4, "learning_rate": 1e3}


@pytest.fixture(autouse=True)
def all_memory_afterwards() -> Iterator[None]:
    use_expandable_segments()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def update(model: str, tokens_per_pack: int) -> tuple[torch.Tensor, Learner]:
    policy = Policy(model, lora=LoraConfig(rank=8, alpha=8), dtype="bfloat16", device="cuda", seed=3)
    learner = Learner(policy, GRPOConfig(tokens_per_pack=tokens_per_pack, logits_mib=1024, **OPTIONS))
    torch.cuda.empty_cache()
    peak_memory()
    learner.update(random_groups(SHAPES), step=0)
    return torch.cat([master.detach().flatten() for master in policy.masters]).cpu(), learner


def test_a_full_gpu_halves_the_packs_and_the_update_is_the_same(tiny_model_path) -> None:
    """torch's own error, from an allocator that may take no more: it ended the run."""
    model = str(tiny_model_path("llama"))
    whole, _ = update(model, 10_000)
    peaks = peak_memory()
    assert 0 < peaks["allocated"] <= peaks["reserved"]
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((peaks["reserved"] - 2**20) / total)
    split, learner = update(model, 10_000)
    assert learner.pack_budget.tokens < 1000
    torch.testing.assert_close(split, whole, rtol=1e-2, atol=1e-3)


def segments_grow() -> bool:
    snapshot: Any = torch.cuda.memory._snapshot()
    return snapshot["allocator_settings"]["expandable_segments"]


def test_segments_grow_unless_the_user_has_set_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert segments_grow()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    use_expandable_segments()
    assert not segments_grow()
