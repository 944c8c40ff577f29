"""The parts of a run's memory on one device, in bytes.

    training_parts(shape, config, "cuda")       # {"adapter_slots": ..., "optimizer": ..., "activations": ..., ...}
    engine_parts(shape, config, "cuda")         # {"base_weights": ..., "activations": ..., "graphs": ...}

Weights, adapter, gradients and optimizer state are counts times bytes. Activations and everything else of a training pass are
measured on the real code (`step_memory.py`). The allocator's gaps, the CUDA context and vLLM's working memory are not in any
tensor and are assumed. `config` is a complete configuration, `optim.tokens_per_pack` set and at least one sequence.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from ..config import GRPOConfig
from .shapes import ModelShape

GIB = 2**30
BF16, FP32 = 2, 4
WIDTH = {"bfloat16": BF16, "float16": BF16, "float32": FP32}
"""Bytes of a weight, of an activation, and of a number in vLLM's KV cache, by `model.dtype`."""
NF4 = 0.5 + FP32 / 64  # bytes a parameter: four bits, and a scale for each 64
# Both moments of a parameter of the adapter; in 8 bits with an fp32 scale for each 256. Paged state may leave the device, but
# counts here.
OPTIMIZERS = {"adamw": 2 * FP32, "adamw_8bit": 2 * (1 + FP32 / 256), "paged_adamw_8bit": 2 * (1 + FP32 / 256)}
# Besides the tensors. CPU: Python's modules, kernels that oneDNN compiles and its scratch, measured. CUDA: the context with its
# libraries, assumed.
RUNTIME_BYTES = {"cpu": 64 * 2**20, "cuda": 768 * 2**20}
NCCL_BYTES = 256 * 2**20  # buffers of one communicator, assumed
CUDA_GAPS = 0.10  # share of the activations that torch's caching allocator loses in blocks, assumed
# vLLM's working memory: the most tokens of one engine step, and the CUDA graphs.
ENGINE_STEP_TOKENS = {"cpu": 4096, "cuda": 8192}
ENGINE_GRAPH_BYTES = {"cpu": 0, "cuda": 512 * 2**20}

RELEVANT_TO_A_PASS = {  # options that a measured pass depends on
    "model": {"load_in", "dtype"},
    "lora": True,
    "rollout": {"num_generations", "max_prompt_length", "max_completion_length"},
    "optim": {"tokens_per_pack", "gradient_checkpointing", "logits_mib"},
}
RESIDENT = ("base_weights", "adapter_slots", "adapter_masters", "optimizer", "guards_snapshot", "runtime")
"""Parts of the training that stay while the engine samples; the others exist in a backward pass only."""
Device = Literal["cuda", "cpu"]


def changed(config: GRPOConfig, changes: Mapping[str, Any]) -> GRPOConfig:
    """The configuration with other values of options by their names with a dot, `{"optim.tokens_per_pack": 2048}`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    return config.model_copy(update={name: getattr(config, name).model_copy(update=of) for name, of in sections.items()})


# ------------------------------------------------------------------------------------------------------------ training


def base_bytes(shape: ModelShape, load_in: str | None, dtype: str = "bfloat16") -> int:
    """One copy of the base weights. In NF4 embeddings, head, norms and biases keep `dtype`."""
    packed = shape.quantisable if load_in == "nf4" else 0
    return round(packed * NF4) + (shape.parameters - packed) * WIDTH[dtype]


def unshared_base_bytes(shape: ModelShape, config: GRPOConfig, device: Device) -> int:
    """The trainer's base weights that are not shared with vLLM, which never holds them in 4 bits.

    By default all are shared on CUDA, and on CPU all but the linear layers, which vLLM lays out differently. The torch engine
    computes with the trainer's.
    """
    share, load_in, dtype = config.model.share_base_weights, config.model.load_in, config.model.dtype
    if share is False or config.rollout.engine == "torch":
        return base_bytes(shape, load_in, dtype)
    if share is True or device == "cuda":
        return 0
    biases = sum(matrix.d_out for matrix in shape.matrices if matrix.has_bias)
    return round(shape.quantisable * (NF4 if load_in else WIDTH[dtype])) + biases * WIDTH[dtype]


def pass_parts(shape: ModelShape, config: GRPOConfig, device: Device) -> dict[str, int]:
    """Activations and what comes on top of them at the peak of a forward and backward, measured. See `measure_pass`."""
    if unshared_base_bytes(shape, config, device) == 0:  # the trainer computes with vLLM's, which are not packed
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
    return shape.layers * tokens_per_pack(config) * temporaries


def tokens_per_pack(config: GRPOConfig) -> int:
    """Of a configuration in which it is set."""
    assert config.optim.tokens_per_pack is not None, "the size of a pack is decided before its memory is"
    return config.optim.tokens_per_pack


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
        "adapter_slots": config.lora.max_rank * per_rank * WIDTH[config.model.dtype],
        "adapter_masters": FP32 * adapter,
        "adapter_gradients": FP32 * adapter,
        "optimizer": optimizer,
        "guards_snapshot": FP32 * adapter + optimizer if device == "cpu" else 0,
        **of_pass,
        "gaps": gap_bytes(shape, config, device, of_pass.get("activations", 0)),
        "runtime": RUNTIME_BYTES[device] + (NCCL_BYTES if device == "cuda" and config.cluster.workers > 1 else 0),
    }
    return {name: size for name, size in parts.items() if size}


# ------------------------------------------------------------------------------------------------------------ sampling


def engine_parts(shape: ModelShape, config: GRPOConfig, device: Device) -> dict[str, int]:
    """vLLM's memory besides its KV cache and the slots: the base, activations of a step, logits, graphs. The torch engine has
    none: it uses the trainer's weights, and its cache is made for a rollout and freed after it."""
    if config.rollout.engine == "torch":
        return {}
    width = WIDTH[config.model.dtype]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widest = max(3 * shape.intermediate, 2 * queries + 2 * keys) + 2 * shape.hidden
    sampled = config.max_num_seqs * shape.vocabulary * (width + 2 * FP32)  # logits, and the sampler's copies
    parts = {
        "base_weights": base_bytes(shape, None, config.model.dtype),
        "activations": ENGINE_STEP_TOKENS[device] * widest * width + sampled,
        "graphs": ENGINE_GRAPH_BYTES[device],
    }
    return {name: size for name, size in parts.items() if size}


def kv_bytes_per_token(shape: ModelShape, config: GRPOConfig) -> int:
    """Keys and values of all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * WIDTH[config.model.dtype]


def gib(size: float) -> str:
    """`3.4 GiB`, or `120 MiB` for less than a tenth of one."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"
