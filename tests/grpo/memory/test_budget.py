"""Whether a run fits on a device, vLLM's share, and changes that would need less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.budget import GIB, Budget, Device, changed, gib, low_memory, plan_budget, savings, training_parts
from rankup.grpo.memory.shapes import ModelShape, read_shape

pytestmark = pytest.mark.slow

QWEN_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Qwen2.5-7B."""
    folder: Path = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return read_shape(str(folder))


SHORT = {"optim.tokens_per_pack": 256, "rollout.max_prompt_length": 64, "rollout.max_completion_length": 64}
LARGE = {"lora.rank": 128, "lora.max_rank": 128, "optim.tokens_per_pack": 16384}


def config(changes: dict[str, Any] | None = None) -> GRPOConfig:
    """Rank 64 on all seven projections, packs of 4096 tokens, with changes."""
    return changed(GRPOConfig(), changes or {})


def test_the_rest_of_the_memory_is_the_kv_cache(shape: ModelShape):
    budget = plan_budget(shape, config(), device="cuda", vram=80 * GIB)
    assert budget.fits
    assert budget.kv_per_token == 2 * 28 * 4 * 128 * 2
    assert 0 <= 80 * GIB - budget.fixed - budget.kv_bytes <= 0.01 * 80 * GIB  # the share is rounded down to two digits
    assert budget.kv_tokens == budget.kv_bytes // budget.kv_per_token
    assert budget.concurrent_sequences == budget.kv_tokens // 768


def test_vllms_share_holds_its_weights_slots_and_cache(shape: ModelShape):
    budget = plan_budget(shape, config(), device="cuda", vram=80 * GIB)
    share = budget.gpu_memory_utilization or 0
    assert share == round(share, 2)
    vllm = sum(budget.engine.values()) + budget.training["adapter_slots"] + budget.kv_bytes
    assert share * 80 * GIB == pytest.approx(vllm, rel=1e-6)
    assert share * 80 * GIB + sum(budget.training.values()) - budget.training["adapter_slots"] <= 80 * GIB


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
            with pytest.raises(ValueError, match=r"--vram 14: too small for the base weights, 14\.2 GiB for vLLM in bf16"):
                plan_budget(shape, held, device="cuda", vram=14 * GIB)
    assert plan_budget(shape, config(), device="cuda", vram=15 * GIB).fits is False


def test_a_second_copy_of_the_base_can_be_saved(shape: ModelShape):
    separate = config({"model.share_base_weights": False})
    with pytest.raises(ValueError, match=r"14\.2 GiB for vLLM in bf16 and 14\.2 GiB more for the trainer") as caught:
        plan_budget(shape, separate, device="cuda", vram=24 * GIB)
    assert "at least 29 GiB, or let both use one copy (14.2 GiB) with --share-base-weights true" in str(caught.value)
    plan_budget(shape, config({"model.share_base_weights": True}), device="cuda", vram=24 * GIB)
    plan_budget(shape, changed(separate, {"model.load_in": "nf4"}), device="cuda", vram=24 * GIB)


def test_nf4_saves_where_the_base_is_not_shared(shape: ModelShape):
    separate, packed = config({"model.share_base_weights": False}), {"model.load_in": "nf4"}
    shared, unshared = ({s.change for s in savings(shape, one, device="cuda")} for one in (config(), separate))
    assert "model.load_in nf4" in unshared - shared

    def minimum(one: GRPOConfig) -> int:
        return plan_budget(shape, one, device="cuda").minimum

    assert minimum(separate) - minimum(changed(separate, packed)) > 0.6 * 2 * shape.quantisable
    assert minimum(config(packed)) == minimum(config())


@pytest.mark.parametrize(
    ("device", "sharing", "change"),
    [
        ("cuda", "auto", None),
        ("cuda", False, "model.share_base_weights auto"),
        ("cpu", "auto", "model.share_base_weights true"),
        ("cpu", False, "model.share_base_weights true"),
        ("cpu", True, None),
    ],
)
def test_sharing_is_suggested_where_it_is_off(shape: ModelShape, device: Device, sharing: Any, change: str | None):
    held = config(SHORT | {"model.share_base_weights": sharing})
    found = [one for one in savings(shape, held, device=device) if "share_base_weights" in one.change]
    assert [one.change for one in found] == ([] if change is None else [change])
    assert sum(one.alone for one in found) == training_parts(shape, held, device).get("base_weights", 0)


def test_savings_are_differences_of_minimum_memory(shape: ModelShape):
    large = config(LARGE)
    found = {saving.change: saving.alone for saving in savings(shape, large, device="cuda")}
    changes = {
        "optim.gradient_checkpointing true": {"optim.gradient_checkpointing": True},
        "lora.rank 64": {"lora.rank": 64, "lora.max_rank": 64},
        "optim.optimizer adamw_8bit": {"optim.optimizer": "adamw_8bit"},
    }
    now = plan_budget(shape, large, device="cuda").minimum
    after = {name: plan_budget(shape, changed(large, of), device="cuda").minimum for name, of in changes.items()}
    assert {name: found[name] for name in changes} == {name: now - needed for name, needed in after.items()}


def test_savings_come_in_the_order_of_least_harm_and_add_up(shape: ModelShape):
    found = savings(shape, config(LARGE), device="cuda")
    changes = [saving.change for saving in found]
    assert changes.index("optim.tokens_per_pack 8192") < changes.index("optim.gradient_checkpointing true")
    assert changes.index("optim.gradient_checkpointing true") < changes.index("lora.rank 64")
    assert changes.index("optim.gradient_checkpointing true") < changes.index("optim.optimizer adamw_8bit")
    assert changes[-1] == "lora.rank 16"
    together = [saving.minimum_with_all_before for saving in found]
    assert together == sorted(together, reverse=True)


def test_savings_in_use_are_not_suggested_again(shape: ModelShape):
    lowest = low_memory(config({"lora.rank": 16}), "cuda")
    assert [saving.change for saving in savings(shape, lowest, device="cuda")] == ["optim.optimizer adamw_8bit"]
    assert savings(shape, changed(lowest, {"optim.optimizer": "paged_adamw_8bit"}), device="cuda") == []


def test_on_cpu_the_cache_takes_all_that_is_left(shape: ModelShape):
    budget: Budget = plan_budget(shape, config(SHORT), device="cpu", vram=80 * GIB)
    assert budget.kv_bytes == 80 * GIB - budget.fixed


@pytest.mark.parametrize(("size", "text"), [(3.44 * GIB, "3.4 GiB"), (50 * 2**20, "50 MiB"), (0.1 * GIB, "0.1 GiB")])
def test_sizes_in_words(size: float, text: str):
    assert gib(size) == text
