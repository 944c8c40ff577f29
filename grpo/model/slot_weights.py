"""An adapter in PEFT's format as the slots hold it, without a policy: for sampling with saved adapters in turn.

    weights = SlotWeights.of(read_start(folder), engine.slots)      # converted and rounded once, on the CPU
    engine.publish(lambda: weights.write(engine.slots))             # some milliseconds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...rollout.slots import AdapterSlot
from .adapters import some
from .start import StartAdapter


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """`a` = A [r, d_in] and `b` = scaling * B [d_out, r] of each layer, by its name in the model, in the slots' dtype."""

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, adapter: StartAdapter, slots: Mapping[str, AdapterSlot]) -> SlotWeights:
        """The adapter, rounded once like a policy's master weights.

        Raises:
            ValueError: a layer has no slot, or one of another shape or of a smaller rank.
        """
        misfit = f"the adapter in {adapter.folder} does not fit the engine"
        if missing := [name for name in adapter.layers if name not in slots]:
            raise ValueError(f"{misfit}: it also has {some(missing)}: add them to lora.targets")
        factors = {}
        for name, layer in adapter.layers.items():
            slot, rank = slots[name], layer.rank
            if (layer.a.shape[1], layer.b.shape[0]) != (slot.a.shape[1], slot.b.shape[0]):
                sizes = f"from {layer.a.shape[1]} to {layer.b.shape[0]}, not from {slot.a.shape[1]} to {slot.b.shape[0]}"
                raise ValueError(f"{misfit}: its {name} is {sizes}: it was trained on another base model")
            if rank > slot.max_rank:
                raise ValueError(f"{misfit}: {name} has rank {rank}, more than lora.max_rank, which is {slot.max_rank}")
            scaled = layer.b.float() * layer.scaling
            factors[name] = (layer.a.to(slot.a.dtype), scaled.to(slot.b.dtype))
        return cls(factors)

    @torch.no_grad()
    def write(self, slots: Mapping[str, AdapterSlot]) -> None:
        """Write the adapter into the slots. Those of other layers, and what is beyond its ranks, become zero."""
        targets, sources, beyond = [], [], []
        for name, slot in slots.items():
            factors = self.factors.get(name)
            rank = 0 if factors is None else factors[0].shape[0]
            if factors is not None:
                targets += [slot.a[:rank], slot.b[:, :rank]]
                sources += factors
            if rank < slot.max_rank:
                beyond += [slot.a[rank:], slot.b[:, rank:]]
        torch._foreach_copy_(targets, sources)  # type: ignore[attr-defined]
        if beyond:
            torch._foreach_zero_(beyond)  # type: ignore[attr-defined]
