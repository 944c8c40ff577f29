"""Saved adapters in the slots, without a policy: bit-exactly what a policy writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankup.grpo.model.slot_weights import SlotWeights
from rankup.grpo.model.start import read_start
from rankup.rollout.slots import AdapterSlot


def saved(policy, folder: Path) -> Path:
    policy.save_adapter(folder)
    return folder


def noisy_slots(policy) -> dict[str, AdapterSlot]:
    """Slots like the policy's, with something in them that must not stay."""
    return {
        name: AdapterSlot(a=torch.full_like(slot.a, 7.0), b=torch.full_like(slot.b, 7.0)) for name, slot in policy.slots.items()
    }


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rank": 64, "alpha": 32, "use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 3.0}},
        {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_what_the_policy_writes(make_policy, tmp_path: Path, lora: dict, dtype: str) -> None:
    policy = make_policy("llama", dtype=dtype, **lora)
    policy.write_slots()
    slots = noisy_slots(policy)
    SlotWeights.of(read_start(saved(policy, tmp_path / "adapter")), slots).write(slots)
    for name, slot in policy.slots.items():
        assert torch.equal(slots[name].a, slot.a) and torch.equal(slots[name].b, slot.b), name


def test_slots_of_layers_without_an_adapter_become_zero(make_policy, tmp_path: Path) -> None:
    few = read_start(saved(make_policy("llama", targets=["q_proj"]), tmp_path / "adapter"))
    slots = noisy_slots(make_policy("llama"))
    SlotWeights.of(few, slots).write(slots)
    for name, slot in slots.items():
        assert bool(slot.b.any()) == name.endswith("q_proj"), name


def test_an_adapter_that_does_not_fit_is_refused(make_policy, tmp_path: Path) -> None:
    policy = make_policy("llama", rank=16)
    start = read_start(saved(policy, tmp_path / "adapter"))
    slots = policy.slots
    first = next(iter(slots))
    with pytest.raises(ValueError, match=rf"it also has {first}: add them to lora\.targets"):
        SlotWeights.of(start, {name: slot for name, slot in slots.items() if name != first})
    small = AdapterSlot(a=slots[first].a[:8], b=slots[first].b[:, :8])
    with pytest.raises(ValueError, match=r"has rank 16, more than lora\.max_rank, which is 8"):
        SlotWeights.of(start, {**slots, first: small})
    narrow = AdapterSlot(a=slots[first].a[:, 1:], b=slots[first].b)
    with pytest.raises(ValueError, match="it was trained on another base model"):
        SlotWeights.of(start, {**slots, first: narrow})
