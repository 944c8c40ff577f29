"""The memory of a run on one device, part by part; whether it fits, the rest for vLLM's KV cache, and options that need less.

    budget = plan_budget(shape, config, device="cuda", vram=24 * GIB)
    budget.fits, budget.kv_tokens, budget.gpu_memory_utilization
    for saving in savings(shape, config, device="cuda"): ...    # changes, the least harmful first

Weights, adapter, gradients and optimizer state are counts times bytes. Activations and everything else of a training pass are
measured on the real code (`step_memory.py`). The allocator's gaps, the CUDA context and vLLM's working memory are not in any
tensor and are assumed. Sizes are in bytes; `config` is a complete configuration, `optim.tokens_per_pack` at least one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config import GRPOConfig
from ..config.run_config import MAX_NUM_SEQS
from .shapes import ModelShape

GIB = 2**30
BF16, FP32 = 2, 4
NF4 = 0.5 + FP32 / 64  # bytes a parameter: four bits, and a scale for each 64
# Both moments of a parameter of the adapter; in 8 bits with an fp32 scale for each 256. Paged state may leave the device, but
# counts here.
OPTIMIZERS = {"adamw": 2 * FP32, "adamw_8bit": 2 * (1 + FP32 / 256), "paged_adamw_8bit": 2 * (1 + FP32 / 256)}
# Besides the tensors. CPU: Python's modules, kernels that oneDNN compiles and its scratch, measured. CUDA: the context with its
# libraries, assumed.
RUNTIME_BYTES = {"cpu": 64 * 2**20, "cuda": 768 * 2**20}
CUDA_GAPS = 0.10  # share of the activations that torch's caching allocator loses in blocks, assumed
# vLLM's working memory: the most tokens of one engine step, and the CUDA graphs.
ENGINE_STEP_TOKENS = {"cpu": 4096, "cuda": 8192}
ENGINE_GRAPH_BYTES = {"cpu": 0, "cuda": 512 * 2**20}

COMMON_SIZES_GIB = (16, 24, 40, 48, 80, 141)
PROMPTS_PER_STEP = 8
MIN_TOKENS_PER_PACK = 2048  # with fewer, matrix products get slow for lack of rows
RELEVANT_TO_A_PASS = {  # options that a measured pass depends on
    "model": {"load_in"},
    "lora": True,
    "rollout": {"num_generations", "max_prompt_length", "max_completion_length"},
    "optim": {"tokens_per_pack", "gradient_checkpointing", "logits_mib"},
}
Device = Literal["cuda", "cpu"]


def changed(config: GRPOConfig, changes: Mapping[str, Any]) -> GRPOConfig:
    """The configuration with other values of options by their names with a dot, `{"optim.tokens_per_pack": 2048}`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    return config.model_copy(update={name: getattr(config, name).model_copy(update=of) for name, of in sections.items()})


# ------------------------------------------------------------------------------------------------------------ training


def base_bytes(shape: ModelShape, load_in: str | None) -> int:
    """One copy of the base weights. In NF4 embeddings, head, norms and biases stay bf16."""
    packed = shape.quantisable if load_in == "nf4" else 0
    return round(packed * NF4) + (shape.parameters - packed) * BF16


def unshared_base_bytes(shape: ModelShape, config: GRPOConfig, device: Device) -> int:
    """The trainer's base weights that are not shared with vLLM, which holds bf16 always.

    By default all are shared on CUDA, and on CPU all but the linear layers, which vLLM lays out differently.
    """
    share, load_in = config.model.share_base_weights, config.model.load_in
    if share is False:
        return base_bytes(shape, load_in)
    if share is True or device == "cuda":
        return 0
    biases = sum(matrix.d_out for matrix in shape.matrices if matrix.has_bias)
    return round(shape.quantisable * (NF4 if load_in else BF16)) + biases * BF16


def pass_parts(shape: ModelShape, config: GRPOConfig, device: Device) -> dict[str, int]:
    """Activations and what comes on top of them at the peak of a forward and backward, measured. See `measure_pass`."""
    if unshared_base_bytes(shape, config, device) == 0:  # the trainer computes with vLLM's, in bf16
        config = changed(config, {"model.load_in": None})
    depth = None if shape.has_like_layers(config.lora.targets) else shape.layers
    return _measured(json.dumps(shape.measured_config), config.model_dump_json(include=RELEVANT_TO_A_PASS), device, depth)


@functools.cache
def _measured(model_config: str, config: str, device: Device, depth: int | None) -> dict[str, int]:
    from .step_memory import measure_pass  # with torch and transformers

    return measure_pass(json.loads(model_config), GRPOConfig(**json.loads(config)), device=device, depth=depth)


def gap_bytes(shape: ModelShape, config: GRPOConfig, device: Device, activations: int) -> int:
    """Memory between activations that the allocator holds and cannot use.

    On CPU a run keeps freed memory (`kernels/cpu_memory.py`), so that what a layer keeps is allocated in place of freed
    temporaries; the remainder, up to the size of the next temporary, stays empty until the backward. So a layer leaves a gap of
    about an fp32 temporary of its norm, and without checkpointing one of the MLP's width. Measured as the difference that
    `--return-freed` makes in scripts/bench/plan_memory.py.
    """
    if device == "cuda":
        return round(CUDA_GAPS * activations)
    temporaries = FP32 * shape.hidden + (0 if config.optim.gradient_checkpointing else BF16 * shape.intermediate)
    return shape.layers * config.optim.tokens_per_pack * temporaries


def training_parts(shape: ModelShape, config: GRPOConfig, device: Device) -> dict[str, int]:
    """The trainer's memory at its peak, by part; "adapter_slots" are those that vLLM samples with, held once.

    The guards' snapshot of master weights and optimizer state is on the host: it counts where the host is the device. A run
    that evaluates (`logging.eval_steps`) keeps two.
    """
    per_rank = shape.parameters_per_rank(config.lora.targets)
    adapter = config.lora.rank * per_rank
    optimizer = round(OPTIMIZERS[config.optim.optimizer] * adapter)
    of_pass = pass_parts(shape, config, device)
    parts = {
        "base_weights": unshared_base_bytes(shape, config, device),
        "adapter_slots": config.lora.max_rank * per_rank * BF16,
        "adapter_masters": FP32 * adapter,
        "adapter_gradients": FP32 * adapter,
        "optimizer": optimizer,
        "guards_snapshot": FP32 * adapter + optimizer if device == "cpu" else 0,
        **of_pass,
        "gaps": gap_bytes(shape, config, device, of_pass.get("activations", 0)),
        "runtime": RUNTIME_BYTES[device],
    }
    return {name: size for name, size in parts.items() if size}


# ------------------------------------------------------------------------------------------------------------ sampling


def engine_parts(shape: ModelShape, device: Device) -> dict[str, int]:
    """vLLM's memory besides its KV cache and the slots: the base in bf16, activations of a step, logits, graphs."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widest = max(3 * shape.intermediate, 2 * queries + 2 * keys) + 2 * shape.hidden
    sampled = MAX_NUM_SEQS * shape.vocabulary * (BF16 + 2 * FP32)  # logits, and the sampler's copies
    parts = {
        "base_weights": base_bytes(shape, None),
        "activations": ENGINE_STEP_TOKENS[device] * widest * BF16 + sampled,
        "graphs": ENGINE_GRAPH_BYTES[device],
    }
    return {name: size for name, size in parts.items() if size}


# -------------------------------------------------------------------------------------------------------------- budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory of a run, in bytes.

    Attributes:
        training, engine: by part; the slots, which are vLLM's buffers, are counted in `training` only.
        kv_per_token: keys and values of all layers in bf16.
        sequence_length, group_size: the KV cache must hold at least one group.
        vram: of the device, None if unknown.
    """

    training: dict[str, int]
    engine: dict[str, int]
    kv_per_token: int
    sequence_length: int
    group_size: int
    device: Device
    vram: int | None = None

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return sum(self.training.values()) + sum(self.engine.values())

    @property
    def kv_of_a_group(self) -> int:
        """The smallest KV cache: the sequences of one group at their full length."""
        return self.group_size * self.sequence_length * self.kv_per_token

    @property
    def minimum(self) -> int:
        """The least memory that the run works with."""
        return self.fixed + self.kv_of_a_group

    @property
    def recommended(self) -> int:
        """With a KV cache for all sequences of a step of 8 prompts, at most 256."""
        sequences = min(MAX_NUM_SEQS, PROMPTS_PER_STEP * self.group_size)
        return self.fixed + sequences * self.sequence_length * self.kv_per_token

    @property
    def fits(self) -> bool | None:
        """None if the device's memory is unknown."""
        return None if self.vram is None else self.kv_bytes >= self.kv_of_a_group

    @property
    def gpu_memory_utilization(self) -> float | None:
        """vLLM's share of the device (all that the trainer leaves), rounded down to two digits."""
        if self.vram is None:
            return None
        trainer = sum(self.training.values()) - self.training["adapter_slots"]
        return max(0, math.floor(100 * (self.vram - trainer) / self.vram)) / 100

    @property
    def kv_bytes(self) -> int:
        """The KV cache that vLLM makes within its share; that of one group if the device's memory is unknown."""
        if self.vram is None:
            return self.kv_of_a_group
        if self.device == "cpu":
            return max(0, self.vram - self.fixed)
        share = int((self.gpu_memory_utilization or 0) * self.vram)
        return max(0, share - self.training["adapter_slots"] - sum(self.engine.values()))

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


def plan_budget(shape: ModelShape, config: GRPOConfig, *, device: Device, vram: int | None = None) -> Budget:
    """The budget of a run; `vram` in bytes.

    Raises:
        ValueError: the device cannot even hold the base weights.
    """
    unshared, sampler = unshared_base_bytes(shape, config, device), base_bytes(shape, None)
    if vram is not None and unshared + sampler > vram:
        more = f" and {gib(unshared)} more for the trainer" if unshared else ""
        instead = f", or let both use one copy ({gib(sampler)}) with --share-base-weights true" if unshared else ""
        least = math.ceil((sampler + unshared) / GIB)
        raise ValueError(
            f"--vram {vram / GIB:g}: too small for the base weights, {gib(sampler)} for vLLM in bf16{more}; take a smaller "
            f"model or a device of at least {least} GiB{instead}"
        )
    return Budget(
        training=training_parts(shape, config, device),
        engine=engine_parts(shape, device),
        kv_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * BF16,
        sequence_length=config.rollout.max_model_length,
        group_size=config.rollout.num_generations,
        device=device,
        vram=vram,
    )


def gib(size: float) -> str:
    """`3.4 GiB`, or `120 MiB` for less than a tenth of one."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


# ------------------------------------------------------------------------------------------------------------- savings


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
    half, quarter = (max(MIN_TOKENS_PER_PACK, optim.tokens_per_pack // parts) for parts in (2, 4))
    candidates = (
        (device == "cuda" and sharing is False, "model.share_base_weights", "auto", "nothing"),
        (_logits_mib(config, device) > 256, "optim.logits_mib", 256, "nothing but a little time"),
        (half < optim.tokens_per_pack, "optim.tokens_per_pack", half, "the same update, in more passes"),
        (device == "cpu" and sharing is not True, "model.share_base_weights", True, "slower sampling"),
        (not optim.gradient_checkpointing, "optim.gradient_checkpointing", True, "a third more training time"),
        (quarter < half, "optim.tokens_per_pack", quarter, "the same update, in still more passes"),
        (optim.optimizer == "adamw", "optim.optimizer", "adamw_8bit", "rounded moments"),
        *((rank < config.lora.rank, "lora.rank", rank, "less capacity") for rank in (64, 32, 16)),
        (config.model.load_in is None, "model.load_in", "nf4", "base weights rounded to 4 bits"),
    )
    return [(option, value, price) for is_open, option, value, price in candidates if is_open]


def with_full_sequences(config: GRPOConfig) -> GRPOConfig:
    """With packs of at least one sequence: a single completion and its prompt are not split."""
    tokens = max(config.optim.tokens_per_pack, config.rollout.max_model_length - 1)
    return changed(config, {"optim.tokens_per_pack": tokens})


def rank_that_fits(shape: ModelShape, config: GRPOConfig, lower: Sequence[int], *, device: Device, vram: int) -> int:
    """The configured rank, or the first of the lower ones if it does not fit even with every change that only costs time."""
    for rank in (config.lora.rank, *lower):
        one = with_full_sequences(changed(config, {"lora.rank": rank, "lora.max_rank": 64 if rank <= 64 else 128}))
        if any(plan_budget(shape, c, device=device, vram=vram).fits for c in (one, low_memory(one, device))):
            return rank
    return config.lora.rank


def low_memory(config: GRPOConfig, device: Device) -> GRPOConfig:
    """The run with every change that costs nothing but time."""
    tokens = min(config.optim.tokens_per_pack, max(MIN_TOKENS_PER_PACK, config.rollout.max_model_length - 1))
    mib = min(256, _logits_mib(config, device))
    return changed(config, {"optim.tokens_per_pack": tokens, "optim.logits_mib": mib, "optim.gradient_checkpointing": True})


def _logits_mib(config: GRPOConfig, device: Device) -> int:
    from ..model.policy import LOGITS_MIB

    return config.optim.logits_mib or LOGITS_MIB[device]
