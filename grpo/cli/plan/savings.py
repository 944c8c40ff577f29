"""Changes to a run that need less memory, the least harmful first.

    for saving in savings(shape, config, device="cuda"): ...
    rank_that_fits(shape, config, (32, 16), device="cuda", vram=24 * GIB)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import GRPOConfig
from ...memory.budget import MIN_TOKENS_PER_PACK, plan_budget, releases_kv_cache, sized
from ...memory.parts import Device, changed, tokens_per_pack
from ...memory.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A change, its price, and what it saves alone; `together`: the configuration with it and all changes before it."""

    change: str
    price: str
    alone: int
    shape: ModelShape
    together: GRPOConfig
    device: Device

    @property
    def minimum_with_all_before(self) -> int:
        """The memory needed with this change and all before it. May measure a pass."""
        return plan_budget(self.shape, self.together, device=self.device).minimum


def savings(shape: ModelShape, config: GRPOConfig, *, device: Device) -> list[Saving]:
    """Changes that need less memory, in the order of least harm."""
    found: list[Saving] = []
    now, together = plan_budget(shape, config, device=device).minimum, config
    for option, value, price in _changes(config, device):
        changes = {option: value, **({"lora.max_rank": 64} if option == "lora.rank" else {})}
        together = changed(together, changes)
        alone = now - plan_budget(shape, changed(config, changes), device=device).minimum
        change = f"{option} {str(value).lower()}"
        if alone > 0:
            found.append(Saving(change=change, price=price, alone=alone, shape=shape, together=together, device=device))
    return found


def _changes(config: GRPOConfig, device: Device) -> list[tuple[str, Any, str]]:
    """(option, value, price)."""
    sharing, optim = config.model.share_base_weights, config.optim
    tokens = tokens_per_pack(config)
    half, quarter = (max(MIN_TOKENS_PER_PACK, tokens // parts) for parts in (2, 4))
    keeps_cache = not releases_kv_cache(config)
    candidates = (
        (keeps_cache, "rollout.release_kv_cache", True, "a moment between sampling and training"),
        (device == "cuda" and sharing is False, "model.share_base_weights", "auto", "nothing"),
        (_logits_mib(config, device) > 256, "optim.logits_mib", 256, "nothing but a little time"),
        (half < tokens, "optim.tokens_per_pack", half, "the same update, in more passes"),
        (device == "cpu" and sharing is not True, "model.share_base_weights", True, "slower sampling"),
        (not optim.gradient_checkpointing, "optim.gradient_checkpointing", True, "a third more training time"),
        (quarter < half, "optim.tokens_per_pack", quarter, "the same update, in still more passes"),
        (optim.optimizer == "adamw", "optim.optimizer", "adamw_8bit", "rounded moments"),
        *((rank < config.lora.rank, "lora.rank", rank, "less capacity") for rank in (64, 32, 16)),
        (config.model.load_in is None, "model.load_in", "nf4", "base weights rounded to 4 bits"),
    )
    return [(option, value, price) for is_open, option, value, price in candidates if is_open]


def rank_that_fits(shape: ModelShape, config: GRPOConfig, lower: Sequence[int], *, device: Device, vram: int) -> int:
    """The configured rank, or the first of the lower ones if it does not fit even with every change that only costs time."""
    for rank in (config.lora.rank, *lower):
        one = sized(changed(config, {"lora.rank": rank, "lora.max_rank": 64 if rank <= 64 else 128}))
        if any(plan_budget(shape, c, device=device, vram=vram).fits for c in (one, low_memory(one, device))):
            return rank
    return config.lora.rank


def low_memory(config: GRPOConfig, device: Device) -> GRPOConfig:
    """The run with every change that costs nothing but time."""
    tokens = min(tokens_per_pack(config), max(MIN_TOKENS_PER_PACK, config.rollout.max_model_length - 1))
    mib = min(256, _logits_mib(config, device))
    return changed(config, {"optim.tokens_per_pack": tokens, "optim.logits_mib": mib, "optim.gradient_checkpointing": True})


def _logits_mib(config: GRPOConfig, device: Device) -> int:
    from ...model.policy import LOGITS_MIB

    return config.optim.logits_mib or LOGITS_MIB[device]
