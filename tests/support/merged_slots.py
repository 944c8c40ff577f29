"""Random adapters in an engine's slots, and the model that they make: transformers with the slots merged into its weights.

    publish_random(engine, ["lm_head"])                  # an adapter there, none anywhere else
    MergedModel(folder, engine.slots).logprobs([5, 9])   # fp64
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

RANK = 16


def publish_random(engine: Any, names: Container[str], seed: int = 0) -> None:
    """Publish random adapters to the slots whose names are given, none to all others."""
    import torch

    def write_slots() -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, slot in engine.slots.items():
            slot.a.zero_()
            slot.b.zero_()
            if name in names:
                slot.a[:RANK] = torch.randn(RANK, slot.a.shape[1], generator=generator) / slot.a.shape[1] ** 0.5
                slot.b[:, :RANK] = torch.randn(slot.b.shape[0], RANK, generator=generator) * 0.2

    engine.publish(write_slots)


class MergedModel:
    """The model in fp64 with slots merged into its weights; those of none of them for an empty mapping."""

    def __init__(self, folder: Path, slots: Any) -> None:
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for name, slot in slots.items():
            layer = self.model.get_submodule(name)
            update = slot.b.double() @ slot.a.double()
            # A parameter of its own: what it is tied to stays what it was.
            layer.weight = nn.Parameter(layer.weight.detach() + (update.t() if isinstance(layer, nn.Embedding) else update))

    def logprobs(self, ids: list[int]) -> list[float]:
        """Of every token but the first."""
        import torch

        with torch.no_grad():
            log_p = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def flat(logprobs: list[list[float]]) -> list[float]:
    """Those of all sequences in one list."""
    return [lp for sequence in logprobs for lp in sequence]
