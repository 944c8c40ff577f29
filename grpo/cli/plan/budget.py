"""Whether a run fits on a device, how much is left for vLLM's KV cache, and what would need less.

    budget = plan_budget(shape, work, vram=24 * GIB)
    budget.fits, budget.kv_tokens, budget.gpu_memory_utilization
    for saving in savings(shape, work): ...           # what to change, that of least harm first

Sizes are in bytes. The parts come from `plan_memory.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...model.policy import LOGITS_MIB
from .memory import MAX_NUM_SEQS, Workload, engine_parts, kv_bytes_per_token, own_base_bytes, training_parts
from .shapes import ModelShape

GIB = 2**30
COMMON_SIZES_GIB = (16, 24, 40, 48, 80, 141)
PROMPTS_PER_STEP = 8
MIN_TOKENS_PER_PACK = 2048  # with fewer, products get slow for their few rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory of a run, in bytes.

    Attributes:
        training, engine: by part; the slots, which are vLLM's buffers, are counted in `training` only.
        kv_per_token: of the KV cache; `sequence_length` and `group_size` say what has to fit in it at least: one group.
        vram: of the device, None where it is not given.
    """

    training: dict[str, int]
    engine: dict[str, int]
    kv_per_token: int
    sequence_length: int
    group_size: int
    device: str
    slots: int
    vram: int | None = None

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return sum(self.training.values()) + sum(self.engine.values())

    @property
    def kv_of_a_group(self) -> int:
        """KV cache that holds the sequences of one group at their full length: the least to work with."""
        return self.group_size * self.sequence_length * self.kv_per_token

    @property
    def needed(self) -> int:
        """The least that the run works with."""
        return self.fixed + self.kv_of_a_group

    @property
    def comfortable(self) -> int:
        """With a KV cache for all sequences of a step of 8 prompts, at most 256."""
        sequences = min(MAX_NUM_SEQS, PROMPTS_PER_STEP * self.group_size)
        return self.fixed + sequences * self.sequence_length * self.kv_per_token

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not given."""
        return None if self.vram is None else self.kv_bytes >= self.kv_of_a_group

    @property
    def gpu_memory_utilization(self) -> float | None:
        """vLLM's share of the device (all but what the trainer takes), rounded down to two digits."""
        if self.vram is None:
            return None
        trainer = sum(self.training.values()) - self.slots
        return max(0, math.floor(100 * (self.vram - trainer) / self.vram)) / 100

    @property
    def kv_bytes(self) -> int:
        """The KV cache that vLLM makes within its share; without a device's memory, what one group needs."""
        if self.vram is None:
            return self.kv_of_a_group
        if self.device == "cpu":
            return max(0, self.vram - self.fixed)
        share = int((self.gpu_memory_utilization or 0) * self.vram)
        return max(0, share - self.slots - sum(self.engine.values()))

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self.kv_bytes // self.kv_per_token

    @property
    def concurrent_sequences(self) -> int:
        """Sequences of full length that the KV cache holds."""
        return self.kv_tokens // self.sequence_length

    @property
    def common_sizes(self) -> tuple[int, ...]:
        """Common device sizes, in GiB, that the run works on."""
        sizes = (dataclasses.replace(self, vram=size * GIB) for size in COMMON_SIZES_GIB)
        return tuple(size for size, budget in zip(COMMON_SIZES_GIB, sizes, strict=True) if budget.fits)


def plan_budget(shape: ModelShape, work: Workload, *, vram: int | None = None) -> Budget:
    """The budget of a run; `vram` in bytes.

    Raises:
        ValueError: the device cannot even hold the base weights.
    """
    training, engine = training_parts(shape, work), engine_parts(shape, work)
    own, sampler = own_base_bytes(shape, work), engine["base_weights"]
    if vram is not None and own + sampler > vram:
        raise ValueError(_too_small(vram, sampler=sampler, own=own))
    return Budget(
        training=training,
        engine=engine,
        kv_per_token=kv_bytes_per_token(shape),
        sequence_length=work.sequence_length,
        group_size=work.num_generations,
        device=work.device,
        vram=vram,
        slots=training["adapter_slots"],
    )


def _too_small(vram: int, *, sampler: int, own: int) -> str:
    what = f"{gib(sampler)} of vLLM's in bf16"
    instead = ""
    if own:
        what += f" and {gib(own)} that the trainer holds besides"
        instead = f", or let both use one copy ({gib(sampler)}) with --share-base-weights true"
    least = math.ceil((sampler + own) / GIB)
    return (
        f"--vram {vram / GIB:g}: too small for the base weights, {what}; take a smaller model or a device of at least {least} "
        f"GiB{instead}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A change, what it costs, and what it saves: alone, and how much is needed with it and all changes before it."""

    change: str
    price: str
    alone: int
    needed_with_all_before: int


def savings(shape: ModelShape, work: Workload) -> list[Saving]:
    """What would need less memory, in the order of least harm; changes that save nothing are left out."""
    needed = plan_budget(shape, work).needed
    found: list[Saving] = []
    together = work
    for change, price, fields in _changes(work):
        alone = needed - plan_budget(shape, dataclasses.replace(work, **fields)).needed
        together = dataclasses.replace(together, **fields)
        if alone > 0:
            total = plan_budget(shape, together).needed
            found.append(Saving(change=change, price=price, alone=alone, needed_with_all_before=total))
    return found


def _changes(work: Workload) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if work.device == "cuda" and work.share_base_weights is False:
        yield "model.share_base_weights auto", "nothing", {"share_base_weights": "auto"}
    if (work.logits_mib or LOGITS_MIB[work.device]) > 256:
        yield "optim.logits_mib 256", "nothing but a little time", {"logits_mib": 256}
    half = max(MIN_TOKENS_PER_PACK, work.tokens_per_pack // 2)
    if half < work.tokens_per_pack:
        yield f"optim.tokens_per_pack {half}", "the same update, in more passes", {"tokens_per_pack": half}
    if work.device == "cpu" and work.share_base_weights is not True:
        yield "model.share_base_weights true", "slower sampling", {"share_base_weights": True}
    if not work.gradient_checkpointing:
        yield "optim.gradient_checkpointing true", "a third more training time", {"gradient_checkpointing": True}
    quarter = max(MIN_TOKENS_PER_PACK, work.tokens_per_pack // 4)
    if quarter < half:
        yield f"optim.tokens_per_pack {quarter}", "the same update, in still more passes", {"tokens_per_pack": quarter}
    if work.optimizer == "adamw":
        yield "optim.optimizer adamw_8bit", "rounded moments", {"optimizer": "adamw_8bit"}
    for rank in (64, 32, 16):
        if rank < work.rank:
            yield f"lora.rank {rank}", "less capacity", {"rank": rank, "max_rank": 64}
    if work.load_in == "bf16":
        yield "model.load_in nf4", "a coarser base; nothing where weights are shared", {"load_in": "nf4"}


def thrifty(work: Workload) -> Workload:
    """The run with every change that harms nothing but time."""
    tokens = min(work.tokens_per_pack, max(MIN_TOKENS_PER_PACK, work.sequence_length - 1))
    mib = min(256, work.logits_mib or LOGITS_MIB[work.device])
    return dataclasses.replace(work, tokens_per_pack=tokens, logits_mib=mib, gradient_checkpointing=True)


def gib(size: float) -> str:
    """`3.4 GiB`, or `120 MiB` for less than a tenth of one."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"
