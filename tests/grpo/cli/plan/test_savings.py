"""Changes that need less memory: what they save, in which order, and when they are not suggested."""

from __future__ import annotations

from typing import Any

import pytest
from model_shapes import qwen_7b

from rankup.grpo.cli.plan.savings import low_memory, savings
from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.budget import plan_budget
from rankup.grpo.memory.parts import Device, changed, training_parts
from rankup.grpo.memory.shapes import ModelShape

pytestmark = pytest.mark.slow

SHORT = {"optim.tokens_per_pack": 256, "rollout.max_prompt_length": 64, "rollout.max_completion_length": 64}
LARGE = {"lora.rank": 128, "lora.max_rank": 128, "optim.tokens_per_pack": 16384}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Qwen2.5-7B."""
    return qwen_7b(tmp_path_factory.mktemp("qwen"))


def config(changes: dict[str, Any] | None = None) -> GRPOConfig:
    """Rank 64 on all seven projections, packs of 4096 tokens, a KV cache that is kept while training, with changes."""
    return changed(GRPOConfig(tokens_per_pack=4096, release_kv_cache=False), changes or {})


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
    lowest = low_memory(config({"lora.rank": 16, "rollout.release_kv_cache": None}), "cuda")
    assert [saving.change for saving in savings(shape, lowest, device="cuda")] == ["optim.optimizer adamw_8bit"]
    assert savings(shape, changed(lowest, {"optim.optimizer": "paged_adamw_8bit"}), device="cuda") == []


def test_releasing_the_cache_is_suggested_first_where_it_is_off(shape: ModelShape):
    """It was assumed that cache and activations exist together."""
    released = config({"rollout.release_kv_cache": None})
    kept, gone = (plan_budget(shape, one, device="cuda").minimum for one in (config(), released))
    found = savings(shape, config(), device="cuda")
    assert (found[0].change, found[0].alone) == ("rollout.release_kv_cache true", kept - gone)
    assert all("release" not in one.change for one in savings(shape, released, device="cuda"))
