"""The memory of a run on one device, in bytes, part by part: pure functions of a model's shapes and of the run's sizes.

    work = Workload(rank=64, max_rank=64, targets="all-linear", tokens_per_pack=8192)
    training_parts(shape, work)         # {"base_weights": ..., "adapter_slots": ..., "activations": ..., ...}
    engine_parts(shape, work)           # vLLM's, but for the KV cache
    kv_bytes_per_token(shape)

What a training step keeps follows from what rankup's autograd functions save (`kept_bytes`); tests hold it against what
autograd is seen to save. The peak is either where the first logits are formed, with every activation kept, or in the backward
of a layer (`peak_work`). `scripts/bench/plan_memory.py` measures the peak of whole updates on CPU beside the sum of
`training_parts`, `scripts/bench/memory.py` that of CUDA's path on tensors without memory. `plan_budget.py` says what fits on a
device.

Legend: T tokens of a pack, N targets of it, n those of a chunk of logits, D hidden, M width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ....kernels.attention_plan import COLUMNS, KEPT_LIMIT, SCORES_LIMIT
from ....kernels.logprob import chunk_rows
from ....kernels.logprob_rows import CPU_BLOCK_BYTES
from ...model.policy import LOGITS_MIB
from .shapes import Matrix, ModelShape

BF16, FP32 = 2, 4
NF4 = 0.5 + FP32 / 64  # bytes a parameter: four bits, and a scale of each 64
# Both moments of a parameter of the adapter, in 8 bits with an fp32 scale of each 256. What is paged may leave the device, but
# counts here.
OPTIMIZERS = {"adamw": 2 * FP32, "adamw_8bit": 2 * (1 + FP32 / 256), "paged_adamw_8bit": 2 * (1 + FP32 / 256)}

QKV, MLP, OUTPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), "o_proj"
EMBEDDINGS = ("embed_tokens", "wte")
LAYER_NUMBER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

# Beside the tensors: Python's modules, kernels that oneDNN compiles and its scratch, as measured; on CUDA, assumed and not
# measured, the context with its libraries.
RUNTIME_BYTES = {"cpu": 64 * 2**20, "cuda": 768 * 2**20}
CUDA_GAPS = 0.10  # share of the activations, lost in blocks of torch's caching allocator: assumed too

# vLLM's own work: tokens of one engine step at most, and the graphs that it captures.
ENGINE_STEP_TOKENS = {"cpu": 4096, "cuda": 8192}
ENGINE_GRAPH_BYTES = {"cpu": 0, "cuda": 512 * 2**20}
MAX_NUM_SEQS = 256


FLASH_ROWS = 128  # to which flash attention's backward rounds the queries of a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What memory depends on besides the model. `logits_mib` None: the device's default, as in `optim.logits_mib`.

    `load_in`, `share_base_weights` and `optimizer` are `model.load_in`, `model.share_base_weights` and `optim.optimizer`.
    """

    rank: int
    max_rank: int
    targets: str | Sequence[str]
    num_generations: int = 8
    prompt_length: int = 512
    completion_length: int = 256
    tokens_per_pack: int = 4096
    gradient_checkpointing: bool = False
    logits_mib: int | None = None
    load_in: Literal["bf16", "nf4"] = "bf16"
    share_base_weights: bool | Literal["auto"] = "auto"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def group_tokens(self) -> int:
        """Tokens of a whole group that go through the model: the last one of each completion does not."""
        return self.prompt_length + self.num_generations * (self.completion_length - 1)

    @property
    def targets_per_pack(self) -> int:
        """Tokens that are predicted in a full pack."""
        return math.ceil(self.tokens_per_pack * self.num_generations * self.completion_length / self.group_tokens)

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_length + self.completion_length


# ------------------------------------------------------------------------------------------------------------ training


def base_bytes(shape: ModelShape, load_in: str) -> int:
    """One copy of the base weights. In NF4 embeddings, head, norms and biases stay bf16."""
    quantised = shape.quantisable if load_in == "nf4" else 0
    return round(quantised * NF4) + (shape.parameters - quantised) * BF16


def own_base_bytes(shape: ModelShape, work: Workload) -> int:
    """What the trainer holds of the base besides vLLM's, which is in bf16 always. What it shares are views of vLLM's weights;
    by default that is all of them on CUDA, and on CPU all but the linear layers, which vLLM lays out anew."""
    if work.share_base_weights is False:
        return base_bytes(shape, work.load_in)
    if work.share_base_weights is True or work.device == "cuda":
        return 0
    biases = sum(matrix.d_out for matrix in shape.matrices if matrix.role in shape.biases)
    return round(shape.quantisable * (NF4 if work.load_in == "nf4" else BF16)) + biases * BF16


def kept_bytes(shape: ModelShape, work: Workload) -> int:
    """Activations that are kept for the backward without checkpointing, of a full pack and all layers.

    Per token and layer, with everything adapted and two norms, in elements of bf16: both norms' inputs and outputs 4 D, queries
    and keys and values, the output layer's input, gate and up 2 M, and x A, the rank of every adapter; and fp32 numbers, one a
    norm. Weights of attention are kept on CPU where they are few, `attention_weight_bytes`.
    """
    targeted = shape.targeted(work.targets)
    layers = layers_with_gradient(shape, targeted)
    adapted: dict[str, list[str]] = defaultdict(list)
    elements = layers * (shape.norm_width / shape.layers + _attention_elements(shape, work))
    for matrix in targeted:
        if matrix.role in (*QKV, *MLP):
            adapted[matrix.parent].append(matrix.role)
        elif LAYER_NUMBER.search(matrix.name) and not (matrix.role == OUTPUT and work.device == "cuda"):
            elements += matrix.d_in  # on CUDA the output layer's input is what flash attention keeps
        elements += work.rank if LAYER_NUMBER.search(matrix.name) else 0
    mlps = sum(bool(set(roles) & set(MLP)) for roles in adapted.values())
    readers = mlps + sum(bool(set(roles) & set(QKV)) for roles in adapted.values())
    elements += readers * shape.hidden  # what q, k, v and what gate, up read
    # A fused MLP keeps gate and up; without an adapter transformers' own keeps act(gate) too.
    elements += mlps * 2 * shape.intermediate + max(0, layers - mlps) * 3 * shape.intermediate
    rotary = 2 * shape.head_dim * BF16  # cosines and sines
    per_token = elements * BF16 + layers * shape.norm_rows / shape.layers * FP32 + rotary
    return round(work.tokens_per_pack * per_token) + layers * attention_weight_bytes(shape, work)


def layers_with_gradient(shape: ModelShape, targeted: Sequence[Matrix]) -> int:
    """Layers from the first adapted one on: those before it keep nothing."""
    numbers = [LAYER_NUMBER.search(matrix.name) for matrix in targeted]
    first = min((int(number[1]) for number in numbers if number), default=shape.layers)
    return shape.layers if any(matrix.role in EMBEDDINGS for matrix in targeted) else max(0, shape.layers - first)


def _attention_elements(shape: ModelShape, work: Workload) -> float:
    """Of a token and a layer. Flash kernels keep the keys that they gathered, a prompt's once for every completion, and their
    result with a number a head in fp32."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if work.device == "cpu":
        return queries + 2 * keys
    return 2 * queries + 2 * keys * _keys_per_token(work) + 2 * shape.heads


def _keys_per_token(work: Workload) -> float:
    gathered = work.prompt_length + work.num_generations * (work.sequence_length - 1)
    return gathered / work.group_tokens


def attention_weight_bytes(shape: ModelShape, work: Workload) -> int:
    """Weights that one layer keeps on CPU: those of all units of a pack together, where they are at most `KEPT_LIMIT`."""
    if work.device != "cpu" or shape.plain_reason is not None:
        return 0
    prompt, completion = work.prompt_length, work.completion_length - 1
    of_group = prompt * _padded(prompt) + work.num_generations * completion * _padded(prompt + completion)
    elements = math.ceil(shape.heads * of_group * work.tokens_per_pack / work.group_tokens)
    return elements * BF16 if elements <= KEPT_LIMIT else 0


def _padded(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


def activation_bytes(shape: ModelShape, work: Workload) -> int:
    """Activations that are alive while the logits are formed: all that is kept, or with checkpointing each layer's input."""
    if work.gradient_checkpointing:
        inputs = 1 + layers_with_gradient(shape, shape.targeted(work.targets))
        return work.tokens_per_pack * BF16 * (inputs * shape.hidden + 2 * shape.head_dim)
    return kept_bytes(shape, work)


def peak_work(shape: ModelShape, work: Workload) -> dict[str, int]:
    """What comes on top of the activations at the peak: the logits of a chunk, or the backward of one layer."""
    moments = [_logits(shape, work), _mlp_backward(shape, work)]
    if work.device == "cuda":
        moments.append(_attention_backward(shape, work))
    return max(moments, key=lambda parts: sum(parts.values()))


def _logits(shape: ModelShape, work: Workload) -> dict[str, int]:
    """A chunk in bf16, on CPU two fp32 blocks, and hidden states and their gradients [N, D], the chunk's in fp32 besides.

    See `kernels/logprob.py`.
    """
    mib = work.logits_mib or LOGITS_MIB[work.device]
    count = math.ceil(work.targets_per_pack / chunk_rows(shape.vocabulary, BF16, mib * 2**20))
    rows = math.ceil(work.targets_per_pack / count)
    block_rows = min(rows, max(1, CPU_BLOCK_BYTES // (FP32 * shape.vocabulary))) if work.device == "cpu" else 0
    hidden = 2 * work.targets_per_pack * BF16 + rows * (BF16 + FP32)
    return {
        "logits_chunk": rows * shape.vocabulary * BF16 + 2 * block_rows * shape.vocabulary * FP32,
        "hidden_states": hidden * shape.hidden + _head_adapter_gradients(shape, work),
    }


def _head_adapter_gradients(shape: ModelShape, work: Workload) -> int:
    heads = [matrix for matrix in shape.targeted(work.targets) if matrix.role == "lm_head"]
    return sum(2 * FP32 * work.rank * (matrix.d_in + matrix.d_out) for matrix in heads)  # summed up, then scaled


def _mlp_backward(shape: ModelShape, work: Workload) -> dict[str, int]:
    """Its product and that one's gradient, 2 M, beside gradients of its input and output; torch needs act(gate) besides, and
    more of D; on CPU with checkpointing, blocks of attention scores."""
    widths = 2 * shape.intermediate + 2 * shape.hidden if work.device == "cuda" else 3 * (shape.intermediate + shape.hidden)
    scores = 2 * SCORES_LIMIT * BF16 if work.device == "cpu" and work.gradient_checkpointing else 0
    gradients = work.tokens_per_pack * BF16 * widths
    return {"layer_backward": gradients + _formed_weight(shape, work), "layer_again": _formed_again(shape, work) + scores}


def _attention_backward(shape: ModelShape, work: Workload) -> dict[str, int]:
    """The flash kernel's, which comes when what the layer's MLP kept, and the input of its norm, are free again.

    Gradients of the residual, of the result and of queries, keys and values; inside the kernel those of queries in fp32 with a
    number a head, and those of keys and values once for each query head.
    """
    queries, keys = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim * _keys_per_token(work)
    expanded = 2 * queries * _keys_per_token(work) if shape.heads != shape.kv_heads else 0
    free = 2 * shape.intermediate + 2 * shape.hidden
    elements = work.tokens_per_pack * (shape.hidden + 2 * queries + keys + expanded - free)
    sequences = (1 + work.num_generations) * work.tokens_per_pack / work.group_tokens
    inside = (work.tokens_per_pack + FLASH_ROWS * sequences) * shape.heads * (shape.head_dim + 1) * FP32
    return {"layer_backward": round(BF16 * elements + inside), "layer_again": _formed_again(shape, work)}


def _formed_again(shape: ModelShape, work: Workload) -> int:
    """With checkpointing, all that a layer keeps, but for its input."""
    if not work.gradient_checkpointing:
        return 0
    layers = max(1, layers_with_gradient(shape, shape.targeted(work.targets)))
    return kept_bytes(shape, work) // layers - work.tokens_per_pack * BF16 * shape.hidden


def _formed_weight(shape: ModelShape, work: Workload) -> int:
    """The weight that a product takes, where the trainer's own is packed."""
    is_packed = work.load_in == "nf4" and own_base_bytes(shape, work) > 0
    return shape.intermediate * shape.hidden * BF16 if is_packed else 0


def gap_bytes(shape: ModelShape, work: Workload) -> int:
    """Memory between activations that the allocator holds and cannot use.

    On CPU a run keeps freed memory (`kernels/cpu_memory.py`), so that what a layer keeps comes to lie in the place of freed
    temporaries; what is left of it, up to the size of the next temporary, stays empty until the backward. A layer so leaves a
    gap of about an fp32 temporary of its norm, and without checkpointing one of the MLP's width. Measured as the difference
    that `--return-freed` makes in scripts/bench/plan_memory.py.
    """
    if work.device == "cuda":
        return round(CUDA_GAPS * activation_bytes(shape, work))
    temporaries = FP32 * shape.hidden + (0 if work.gradient_checkpointing else BF16 * shape.intermediate)
    layers = layers_with_gradient(shape, shape.targeted(work.targets))
    return layers * work.tokens_per_pack * temporaries


def training_parts(shape: ModelShape, work: Workload) -> dict[str, int]:
    """The trainer's memory at its peak, by part; "adapter_slots" are those that vLLM samples with, held once.

    "base_weights" are those that it does not share with vLLM. The guards' snapshot of masters and optimizer lies on the host:
    it counts where the host is the device. A run that evaluates as it goes (`logging.eval_steps`) keeps two.
    """
    adapter = work.rank * shape.parameters_per_rank(work.targets)
    optimizer = round(OPTIMIZERS[work.optimizer] * adapter)
    parts = {
        "base_weights": own_base_bytes(shape, work),
        "adapter_slots": work.max_rank * shape.parameters_per_rank(work.targets) * BF16,
        "adapter_masters": FP32 * adapter,
        "adapter_gradients": FP32 * adapter,
        "optimizer": optimizer,
        "guards_snapshot": FP32 * adapter + optimizer if work.device == "cpu" else 0,
        "activations": activation_bytes(shape, work),
        **peak_work(shape, work),
        "gaps": gap_bytes(shape, work),
        "runtime": RUNTIME_BYTES[work.device],
    }
    return {name: size for name, size in parts.items() if size}


# ------------------------------------------------------------------------------------------------------------ sampling


def engine_parts(shape: ModelShape, work: Workload) -> dict[str, int]:
    """What vLLM needs besides its KV cache and the slots: the base in bf16, activations of a step, logits, graphs."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widest = max(3 * shape.intermediate, 2 * queries + 2 * keys) + 2 * shape.hidden
    sampled = MAX_NUM_SEQS * shape.vocabulary * (BF16 + 2 * FP32)  # logits, and what the sampler makes of them
    parts = {
        "base_weights": base_bytes(shape, "bf16"),
        "activations": ENGINE_STEP_TOKENS[work.device] * widest * BF16 + sampled,
        "graphs": ENGINE_GRAPH_BYTES[work.device],
    }
    return {name: size for name, size in parts.items() if size}


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of all layers in bf16."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BF16
