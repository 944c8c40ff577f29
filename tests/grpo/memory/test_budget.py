"""Whether a run fits on a device, vLLM's share, and changes that would need less memory."""

from __future__ import annotations

from typing import Any

import pytest
from model_shapes import qwen_7b

from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.budget import Budget, plan_budget
from rankup.grpo.memory.parts import GIB, RESIDENT, changed, gib
from rankup.grpo.memory.shapes import ModelShape

pytestmark = pytest.mark.slow



@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Qwen2.5-7B."""
    return qwen_7b(tmp_path_factory.mktemp("qwen"))


SHORT = {"optim.tokens_per_pack": 256, "rollout.max_prompt_length": 64, "rollout.max_completion_length": 64}
KEPT = {"rollout.release_kv_cache": False}


def config(changes: dict[str, Any] | None = None) -> GRPOConfig:
    """Rank 64 on all seven projections, packs of 4096 tokens, with changes."""
    return changed(GRPOConfig(tokens_per_pack=4096), changes or {})


def test_vllms_share_holds_its_weights_slots_and_cache(shape: ModelShape):
    for changes in ({}, KEPT):
        budget = plan_budget(shape, config(changes), device="cuda", vram=48 * GIB)
        share = budget.gpu_memory_utilization or 0
        assert share == round(share, 3) and budget.fits
        assert budget.kv_per_token == 2 * 28 * 4 * 128 * 2
        vllm = sum(budget.engine.values()) + budget.training["adapter_slots"] + budget.kv_bytes
        assert share * 48 * GIB == pytest.approx(vllm, rel=1e-6)


def test_with_release_each_phase_leaves_room_for_what_the_other_keeps_only(shape: ModelShape):
    """vLLM's cache and a pass never exist together, so their sum may exceed the device."""
    long = {"rollout.max_completion_length": 8192, "rollout.max_num_seqs": 256}
    released, kept = (plan_budget(shape, config(long | more), device="cuda", vram=48 * GIB) for more in ({}, KEPT))
    in_a_pass = sum(size for name, size in released.training.items() if name not in RESIDENT)
    assert in_a_pass > 10 * GIB
    assert released.kv_bytes - kept.kv_bytes == pytest.approx(in_a_pass, abs=0.002 * 48 * GIB)
    for budget in (released, kept):
        share = (budget.gpu_memory_utilization or 0) * 48 * GIB
        trainer = budget.trainer_resident if budget.releases_kv else budget.trainer_peak
        assert 0 <= 48 * GIB - share - trainer <= 0.001 * 48 * GIB, "all of the device, rounded down to three digits"
        assert budget.training_peak <= 48 * GIB


def test_the_cache_is_not_larger_than_all_sequences_need(shape: ModelShape):
    budget = plan_budget(shape, config(), device="cuda", vram=141 * GIB)
    wanted = 64 * 768 * budget.kv_per_token
    assert budget.kv_wanted == wanted <= budget.kv_bytes <= 1.1 * wanted + 0.5 * GIB
    many = plan_budget(shape, config({"optim.prompts_per_step": 100}), device="cuda", vram=141 * GIB)
    assert many.kv_wanted == 4 * wanted, "256 at a time"
    episodes = {"optim.prompts_per_step": 100, "rollout.tools": ["tools.py:add"]}
    with_episodes = plan_budget(shape, config(episodes), device="cuda", vram=141 * GIB)
    assert with_episodes.kv_wanted == 800 / 64 * wanted, "those that wait for a tool keep their cache"


def test_memory_in_use_by_others_is_not_divided(shape: ModelShape):
    long = config({"rollout.max_completion_length": 8192, "rollout.max_num_seqs": 256})
    alone, shared = (plan_budget(shape, long, device="cuda", vram=48 * GIB, in_use=n * GIB) for n in (0, 10))
    assert alone.kv_bytes - shared.kv_bytes == pytest.approx(10 * GIB, abs=0.002 * 48 * GIB)
    assert (shared.gpu_memory_utilization or 0) * 48 * GIB + shared.trainer_resident <= 38 * GIB


def test_a_share_of_the_user_is_kept(shape: ModelShape):
    small, large = (
        plan_budget(shape, config({"rollout.gpu_memory_utilization": share, **KEPT}), device="cuda", vram=48 * GIB)
        for share in (0.5, 0.95)
    )
    assert small.gpu_memory_utilization == 0.5 and small.fits
    assert small.kv_bytes == int(0.5 * 48 * GIB) - small.of_vllm
    assert large.fits is False, "nothing is left for the trainer"
    assert plan_budget(shape, config({"rollout.gpu_memory_utilization": 0.9}), device="cuda", vram=48 * GIB).fits


def test_float32_takes_twice_the_bytes_of_bfloat16(shape: ModelShape):
    narrow, wide = (plan_budget(shape, config({"model.dtype": name}), device="cuda") for name in ("bfloat16", "float32"))
    assert wide.kv_per_token == 2 * narrow.kv_per_token
    assert wide.engine["base_weights"] == 2 * narrow.engine["base_weights"]
    assert wide.training["adapter_slots"] == 2 * narrow.training["adapter_slots"]
    assert wide.training["activations"] > 1.5 * narrow.training["activations"]


def test_the_torch_engine_has_no_weights_of_its_own(shape: ModelShape):
    budget = plan_budget(shape, config({"rollout.engine": "torch"}), device="cuda", vram=48 * GIB)
    assert budget.engine == {} and budget.gpu_memory_utilization is None and budget.fits
    assert budget.training["base_weights"] == 2 * shape.parameters


def test_the_smallest_common_size_holds_the_minimum(shape: ModelShape):
    budget = plan_budget(shape, config(), device="cuda")
    assert budget.fits is None and budget.gpu_memory_utilization is None
    smallest = budget.common_sizes[0]
    assert budget.minimum <= smallest * GIB
    assert plan_budget(shape, config(), device="cuda", vram=smallest * GIB).fits
    assert not any(plan_budget(shape, config(), device="cuda", vram=size * GIB).fits for size in (40, 48) if size < smallest)
    assert budget.common_sizes[-1] == 141


def test_a_device_that_cannot_hold_the_base_is_refused(shape: ModelShape):
    """vLLM holds a copy in bf16, whatever the trainer holds."""
    for sharing in ("auto", False):
        for load_in in (None, "nf4"):
            held = config({"model.share_base_weights": sharing, "model.load_in": load_in})
            with pytest.raises(ValueError, match=r"14\.0 GiB of memory: too small for the base weights, 14\.2 GiB for vLLM"):
                plan_budget(shape, held, device="cuda", vram=14 * GIB)
    assert plan_budget(shape, config(), device="cuda", vram=15 * GIB).fits is False


def test_a_second_copy_of_the_base_can_be_saved(shape: ModelShape):
    separate = config({"model.share_base_weights": False})
    with pytest.raises(ValueError, match=r"14\.2 GiB for vLLM and 14\.2 GiB more for the trainer") as caught:
        plan_budget(shape, separate, device="cuda", vram=24 * GIB)
    assert "at least 29 GiB, or let both use one copy (14.2 GiB) with share_base_weights true" in str(caught.value)
    plan_budget(shape, config({"model.share_base_weights": True}), device="cuda", vram=24 * GIB)
    plan_budget(shape, changed(separate, {"model.load_in": "nf4"}), device="cuda", vram=24 * GIB)


def test_on_cpu_the_cache_takes_all_that_is_left(shape: ModelShape):
    budget: Budget = plan_budget(shape, config(SHORT), device="cpu", vram=80 * GIB)
    assert budget.kv_bytes == 80 * GIB - budget.sampling


@pytest.mark.parametrize(("size", "text"), [(3.44 * GIB, "3.4 GiB"), (50 * 2**20, "50 MiB"), (0.1 * GIB, "0.1 GiB")])
def test_sizes_in_words(size: float, text: str):
    assert gib(size) == text
