"""How vLLM and the trainer divide a device's memory: whether a run fits, and what is left for vLLM's KV cache.

    budget = plan_budget(shape, config, device="cuda", vram=24 * GIB)
    budget.fits, budget.kv_tokens, budget.gpu_memory_utilization

vLLM samples and the trainer trains in turn. With `rollout.release_kv_cache` the KV cache exists while sampling and a pass while
training, so each of the two may take what the other's resident part leaves. Without it both exist all the time.

vLLM takes `gpu_memory_utilization` of the device's total memory, whatever else is in use: its weights, its buffers, the peak of
a forward of the largest batch, its graphs, and the rest as KV cache. The context, which exists before, is not part of it.
Sizes are in bytes. `config` is a complete configuration, as `sized` returns it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..config import GRPOConfig
from ..config.optim import USUAL_TOKENS_PER_PACK
from .parts import GIB, RESIDENT, Device, changed, engine_parts, gib, kv_bytes_per_token, training_parts
from .shapes import ModelShape

COMMON_SIZES_GIB = (16, 24, 40, 48, 80, 141)
MIN_TOKENS_PER_PACK = 2048  # with fewer, matrix products get slow for lack of rows
KV_BLOCK = 16  # tokens of a block of vLLM's cache on CUDA
KV_SLACK = 0.1  # more than the sequences need: the parts of vLLM are estimates
KV_SLACK_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory of a run.

    Attributes:
        training, engine: by part; the slots, which are vLLM's buffers, are counted in `training` only.
        kv_per_token: keys and values of all layers.
        sequence_length, group_size: the KV cache must hold at least one group.
        num_sequences: that are sampled at the same time. The KV cache need not hold more.
        releases_kv: whether there is no KV cache while training.
        share: user-supplied `rollout.gpu_memory_utilization`.
        vram: of the device, None if unknown.
        in_use: of it, by other processes.
    """

    training: dict[str, int]
    engine: dict[str, int]
    kv_per_token: int
    sequence_length: int
    group_size: int
    num_sequences: int
    device: Device
    releases_kv: bool
    share: float | None = None
    vram: int | None = None
    in_use: int = 0

    @property
    def has_vllm(self) -> bool:
        """Whether vLLM samples; the torch engine has no memory of its own."""
        return bool(self.engine)

    @property
    def of_vllm(self) -> int:
        """What vLLM holds or needs while it samples, besides its KV cache."""
        return sum(self.engine.values()) + self.training["adapter_slots"] if self.has_vllm else 0

    @property
    def trainer_resident(self) -> int:
        """What the trainer holds while vLLM samples; the slots are vLLM's."""
        return self._trainer(RESIDENT)

    @property
    def trainer_peak(self) -> int:
        """What the trainer takes in a backward pass, the same way."""
        return self._trainer(tuple(self.training))

    def _trainer(self, names: tuple[str, ...]) -> int:
        slots = "adapter_slots" if self.has_vllm else ""
        return sum(size for name, size in self.training.items() if name in names and name != slots)

    @property
    def vllm_while_training(self) -> int:
        """Without the KV cache. What vLLM computes a step in is free for the trainer once the cache is released."""
        return self.of_vllm - (self.engine.get("activations", 0) if self.releases_kv else 0)

    @property
    def sampling(self) -> int:
        """All but the KV cache while sampling."""
        return self.of_vllm + (self.trainer_resident if self.releases_kv else self.trainer_peak)

    @property
    def training_peak(self) -> int:
        """All while training, but a KV cache that is kept."""
        return self.vllm_while_training + self.trainer_peak

    @property
    def kv_of_a_group(self) -> int:
        """The smallest KV cache: the sequences of one group at their full length."""
        return self._kv_of(self.group_size)

    @property
    def kv_wanted(self) -> int:
        """The largest KV cache that is of use: all concurrent sequences at their full length."""
        return self._kv_of(max(self.num_sequences, self.group_size))

    def _kv_of(self, sequences: int) -> int:
        block = KV_BLOCK if self.device == "cuda" else 1
        return sequences * block * math.ceil(self.sequence_length / block) * self.kv_per_token

    @property
    def minimum(self) -> int:
        """The least memory that the run works with."""
        return self._with_cache_of(self.kv_of_a_group)

    @property
    def recommended(self) -> int:
        """With a KV cache for all concurrent sequences."""
        return self._with_cache_of(self.kv_wanted)

    def _with_cache_of(self, kv_bytes: int) -> int:
        return max(self.sampling + kv_bytes, self.training_peak + (0 if self.releases_kv else kv_bytes))

    @property
    def fits(self) -> bool | None:
        """None if the device's memory is unknown."""
        if self.vram is None:
            return None
        kept = 0 if self.releases_kv else self.kv_bytes
        return self.kv_bytes >= self.kv_of_a_group and self.training_peak + kept <= self.usable

    @property
    def usable(self) -> int:
        """The device's memory that is not in use by others."""
        assert self.vram is not None, "the memory of the device is known"
        return self.vram - self.in_use

    @property
    def gpu_memory_utilization(self) -> float | None:
        """vLLM's share of the device: what the trainer leaves, as far as it is of use; rounded down to three digits."""
        if self.vram is None or not self.has_vllm:
            return None
        if self.share is not None:
            return self.share
        slack = KV_SLACK_BYTES + KV_SLACK * self.kv_wanted
        taken = min(self.usable - self.sampling + self.of_vllm, self.of_vllm + self.kv_wanted + slack)
        return max(0, math.floor(1000 * taken / self.vram)) / 1000

    @property
    def kv_bytes(self) -> int:
        """The KV cache that vLLM makes within its share; that of one group if the device's memory is unknown."""
        if self.vram is None:
            return self.kv_of_a_group
        if self.device == "cpu" or not self.has_vllm:
            return max(0, self.usable - self.sampling)
        return max(0, int((self.gpu_memory_utilization or 0) * self.vram) - self.of_vllm)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self.kv_bytes // self.kv_per_token

    @property
    def concurrent_sequences(self) -> int:
        """Sequences of full length in the KV cache."""
        return self.kv_tokens // self.sequence_length

    @property
    def common_sizes(self) -> tuple[int, ...]:
        """Common device sizes, in GiB, that the run works on."""
        sizes = (dataclasses.replace(self, vram=size * GIB) for size in COMMON_SIZES_GIB)
        return tuple(size for size, budget in zip(COMMON_SIZES_GIB, sizes, strict=True) if budget.fits)


def plan_budget(
    shape: ModelShape, config: GRPOConfig, *, device: Device, vram: int | None = None, in_use: int = 0
) -> Budget:
    """The budget of a run.

    Args:
        vram: the device's total memory.
        in_use: of it, by other processes.

    Raises:
        ValueError: the device cannot even hold the base weights.
    """
    training, engine = training_parts(shape, config, device), engine_parts(shape, config, device)
    if vram is not None:
        _check_base(training.get("base_weights", 0), engine.get("base_weights", 0), vram - in_use)
    return Budget(
        training=training,
        engine=engine,
        kv_per_token=kv_bytes_per_token(shape, config),
        sequence_length=config.rollout.max_model_length,
        group_size=config.rollout.num_generations,
        num_sequences=_num_sequences(config),
        device=device,
        releases_kv=releases_kv_cache(config),
        share=config.rollout.gpu_memory_utilization,
        vram=vram,
        in_use=in_use,
    )


def releases_kv_cache(config: GRPOConfig) -> bool:
    """Whether the engine gives back the memory of its KV cache while the trainer works."""
    return config.rollout.engine == "torch" or config.rollout.release_kv_cache is not False


def sized(config: GRPOConfig, tokens: int | None = None) -> GRPOConfig:
    """With packs of `tokens`, else of `optim.tokens_per_pack`, but of at least one sequence: a prompt with its completion is
    not split."""
    tokens = tokens or config.optim.tokens_per_pack or USUAL_TOKENS_PER_PACK
    return changed(config, {"optim.tokens_per_pack": max(tokens, config.rollout.max_model_length - 1)})


def _num_sequences(config: GRPOConfig) -> int:
    """Sequences in the KV cache. Open episodes keep theirs between turns, so there all completions of a step count."""
    has_episodes = bool(config.rollout.tools) or config.rollout.environment is not None
    return max(config.max_num_seqs, config.completions_per_step) if has_episodes else config.max_num_seqs


def _check_base(of_trainer: int, of_vllm: int, usable: int) -> None:
    if of_trainer + of_vllm <= usable:
        return
    least = math.ceil((of_trainer + of_vllm) / GIB)
    if not of_vllm:
        raise ValueError(
            f"{gib(usable)} of memory: too small for the base weights, {gib(of_trainer)}; take a smaller model or a device of "
            f"at least {least} GiB"
        )
    more = f" and {gib(of_trainer)} more for the trainer" if of_trainer else ""
    instead = f", or let both use one copy ({gib(of_vllm)}) with share_base_weights true" if of_trainer else ""
    raise ValueError(
        f"{gib(usable)} of memory: too small for the base weights, {gib(of_vllm)} for vLLM{more}; take a smaller model or a "
        f"device of at least {least} GiB{instead}"
    )
