"""A model of one step on many devices: collectives by formula, rollouts and training by a simulation of every worker.

    model = Model.of(read_shape(folder), rank=64)
    all_reduce_seconds(model.gradient_bytes, 512, INFINIBAND, "nodes")
    steps = simulate(model, Batch(prompts=128), workers=64, network=INFINIBAND, repeats=20)
    steps.seconds, steps.rollout, steps.rollout_wait, steps.training, steps.training_wait, steps.network

Nothing here is measured. Rates come from vendors' data sheets; the achieved shares of them, and latencies, are assumed. Every
worker holds the complete model, and all completions of a prompt are on one worker. A step is rollout, wait, training, wait,
all-reduce. Times are in seconds, sizes in bytes, rates in bytes or operations per second. Legend: N workers, M nodes, P
prompts, G completions of each.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rankup.grpo.memory.shapes import ModelShape

BF16, FP32 = 2, 4
RECORD_BYTES = 100  # rewards and lengths of one completion
CHECKSUM_BYTES = 8
SLOTS = 256  # sequences that vLLM decodes concurrently: its max_num_seqs, as in `rankup plan`

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Real = TypeVar("Real", float, Floats)
Algorithm = Literal["ring", "nodes", "tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An H100 SXM. Data sheet: `memory_rate` and `operations` (bf16, dense). Assumed: the achieved shares of them, and
    `iteration_seconds`, the overhead of an iteration of vLLM (scheduler, sampler, launches)."""

    memory_rate: float = 3.35e12
    operations: float = 989e12
    memory_share: float = 0.7
    compute_share: float = 0.4
    iteration_seconds: float = 1e-3

    def reading(self, size: Real) -> Real:
        """Seconds to read `size` bytes from the device's memory."""
        return size / (self.memory_rate * self.memory_share)

    def computing(self, operations: Real) -> Real:
        """Seconds for operations of matrix products."""
        return operations / (self.operations * self.compute_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Nodes of `node` devices. Data sheet, in one direction: `inside`, from a device to the others of its node, and `between`,
    from a node to the others. Assumed: the achieved `share` of them, and the latencies of one hop."""

    name: str
    node: int = 8
    inside: float = 450e9
    between: float
    inside_latency: float = 3e-6
    between_latency: float
    share: float = 0.8


H100 = Device()
INFINIBAND = Network(name="InfiniBand, 8 × 400 Gbit/s per node", between=8 * 50e9, between_latency=10e-6)
ETHERNET = Network(name="Ethernet, 100 Gbit/s per node", between=12.5e9, between_latency=50e-6)
SLOW_ETHERNET = Network(name="Ethernet, 10 Gbit/s per device", node=1, between=1.25e9, between_latency=50e-6)
NETWORKS = (INFINIBAND, ETHERNET, SLOW_ETHERNET)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Parameters of a model (body without embeddings, LM head) and its adapter, and bytes of KV cache per token."""

    body: int
    head: int
    adapter: int
    kv_bytes: int

    @classmethod
    def of(cls, shape: ModelShape, rank: int) -> Model:
        """With an adapter of this rank on all linear layers except the head."""
        head = [matrix for matrix in shape.matrices if matrix.role == "lm_head"]
        return cls(
            body=shape.quantisable,
            head=sum(matrix.d_in * matrix.d_out for matrix in head),
            adapter=rank * shape.parameters_per_rank("all-linear"),
            kv_bytes=2 * shape.layers * shape.kv_heads * shape.head_dim * BF16,
        )

    @property
    def gradient_bytes(self) -> int:
        """The flat fp32 buffer that is all-reduced once per step."""
        return FP32 * self.adapter

    @property
    def read_bytes(self) -> int:
        """Read by every iteration of decoding, even for one sequence: body, head and adapter in bf16."""
        return BF16 * (self.body + self.head + self.adapter)

    @property
    def operations_per_token(self) -> int:
        """Of decoding and of prefill."""
        return 2 * (self.body + self.head + self.adapter)

    def training_operations(self, tokens: Floats, completion_tokens: Floats) -> Floats:
        """Of `tokens` through the layers with gradient checkpointing, and of `completion_tokens` through the head.

        The frozen weights: forward, forward again, gradient of the input, 2 operations a parameter each. The gradients of
        the adapter are 2 more. The head is not computed again.
        """
        return tokens * (6 * self.body + 8 * self.adapter) + completion_tokens * 4 * self.head


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's prompts and the lengths of their completions, in tokens.

    Lengths are log-normal with a cap: a factor of the prompt (hard prompts have long completions) times one of the completion.
    `prompt_sigma` and `completion_sigma` are the standard deviations of their logarithms.
    """

    prompts: int
    generations: int = 8
    prompt_tokens: int = 256
    median: float = 600.0
    prompt_sigma: float = 0.5
    completion_sigma: float = 0.4
    cap: int = 4096

    def draw(self, random: np.random.Generator) -> Integers:
        """Lengths [P, G] of one step, from 1 to the cap."""
        of_prompt = random.normal(0, self.prompt_sigma, (self.prompts, 1))
        of_completion = random.normal(0, self.completion_sigma, (self.prompts, self.generations))
        lengths = self.median * np.exp(of_prompt + of_completion)
        return np.clip(np.rint(lengths), 1, self.cap).astype(np.int64)


# -------------------------------------------------------------------------------------------------------- collectives


def ring_seconds(size: float, members: int, rate: float, latency: float) -> float:
    """A ring's all-reduce: every member sends 2 (N - 1) / N of the buffer, in 2 (N - 1) hops."""
    return 2 * (members - 1) / members * size / rate + 2 * (members - 1) * latency


def all_reduce_seconds(size: float, workers: int, network: Network, algorithm: Algorithm) -> float:
    """An all-reduce of a buffer of `size` bytes on every worker.

    "ring": one ring through all workers, as fast as its slowest link. "nodes": reduce-scatter inside the nodes, rings of the
    parts between them, all-gather inside. "tree": the same with trees between the nodes, of 2 log2 M hops.
    """
    node = min(network.node, workers)
    assert workers % node == 0, "nodes are full"
    nodes = workers // node
    inside, between = network.inside * network.share, network.between * network.share
    within = ring_seconds(size, node, inside, network.inside_latency)
    if nodes == 1:
        return within
    if algorithm == "ring":
        slowest = between if node == 1 else min(inside, between)
        return ring_seconds(size, workers, slowest, network.between_latency)
    if algorithm == "nodes":
        return within + ring_seconds(size, nodes, between, network.between_latency)
    return within + 2 * size / between + 2 * math.ceil(math.log2(nodes)) * network.between_latency


def all_gather_seconds(size: float, workers: int, network: Network) -> float:
    """An all-gather in one ring: every worker has `size` bytes and receives those of all others."""
    node = min(network.node, workers)
    is_one_node = workers == node
    rate = network.inside if is_one_node else network.between if node == 1 else min(network.inside, network.between)
    latency = network.inside_latency if is_one_node else network.between_latency
    return (workers - 1) * (size / (rate * network.share) + latency)


def network_seconds(model: Model, batch: Batch, workers: int, network: Network, algorithm: Algorithm = "nodes") -> float:
    """Everything that a step sends: gradients, records of the completions, a checksum per worker."""
    records = math.ceil(batch.prompts / workers) * batch.generations * RECORD_BYTES
    gathered = all_gather_seconds(records, workers, network) + all_gather_seconds(CHECKSUM_BYTES, workers, network)
    return all_reduce_seconds(model.gradient_bytes, workers, network, algorithm) + gathered


# --------------------------------------------------------------------------------------------------------- simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Of one worker: seconds, iterations of the engine, and peak tokens in the KV cache (the prompt once per completion)."""

    seconds: float
    iterations: int
    kv_tokens: int


def starts_in_slots(lengths: Integers, slots: int) -> Integers:
    """The iteration at which each sequence starts: 0 for the first `slots`, for others when a running one ends."""
    starts = np.zeros_like(lengths)
    running = lengths[:slots].tolist()
    heapq.heapify(running)
    for index in range(slots, len(lengths)):
        starts[index] = heapq.heapreplace(running, running[0] + int(lengths[index]))
    return starts


def roll_out(lengths: Integers, prompt_tokens: int, model: Model, device: Device, slots: int = SLOTS) -> Rollout:
    """Decode the sequences of one worker, `lengths` [P, G], after one prefill of each prompt.

    An iteration adds one token to every live sequence. It takes the time of reading the weights and the keys and values of the
    live sequences, or of its matrix products if that is longer.
    """
    if lengths.size == 0:
        return Rollout(seconds=0.0, iterations=0, kv_tokens=0)
    flat = lengths.ravel()
    starts = starts_in_slots(flat, slots)
    ends = starts + flat
    iterations = int(ends.max())
    size = iterations + 1
    live = np.cumsum(np.bincount(starts, minlength=size) - np.bincount(ends, minlength=size))[:-1]
    started = np.bincount(starts, starts, size) - np.bincount(ends, starts, size)
    context = (live * (prompt_tokens + np.arange(iterations)) - np.cumsum(started)[:-1]).astype(np.float64)
    reading = device.reading(model.read_bytes + model.kv_bytes * context)
    products = device.computing(live.astype(np.float64) * model.operations_per_token)
    decoding = np.maximum(reading, products).sum() + iterations * device.iteration_seconds
    prompts = device.computing(float(len(lengths) * prompt_tokens * model.operations_per_token))
    return Rollout(seconds=float(decoding + prompts), iterations=iterations, kv_tokens=int(context.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Means over the simulated steps, in seconds: `rollout` and `training` of the mean worker, the waits from there to the
    slowest one. `iterations` of the slowest worker, `kv_tokens` the maximum over workers and steps."""

    workers: int
    completions: int
    rollout: float
    rollout_wait: float
    training: float
    training_wait: float
    network: float
    iterations: float
    kv_tokens: int

    @property
    def seconds(self) -> float:
        """A complete step."""
        return self.rollout + self.rollout_wait + self.training + self.training_wait + self.network

    @property
    def busy(self) -> float:
        """The share of the step in which the mean worker samples or trains."""
        return (self.rollout + self.training) / self.seconds


def simulate(
    model: Model,
    batch: Batch,
    *,
    workers: int,
    network: Network = INFINIBAND,
    device: Device = H100,
    repeats: int,
    seed: int = 0,
) -> Steps:
    """Steps of `workers` devices that share the batch. Workers without a prompt only wait."""
    rows = []
    random = np.random.default_rng(seed)
    for _ in range(repeats):
        shares = np.array_split(batch.draw(random), workers)
        rollouts = [roll_out(share, batch.prompt_tokens, model, device) for share in shares]
        completion_tokens = np.array([share.sum() for share in shares], dtype=np.float64)
        prompt_tokens = np.array([len(share) * batch.prompt_tokens for share in shares])
        training = device.computing(model.training_operations(completion_tokens + prompt_tokens, completion_tokens))
        seconds = np.array([rollout.seconds for rollout in rollouts])
        iterations, kv_tokens = (max(one.iterations for one in rollouts), max(one.kv_tokens for one in rollouts))
        rows.append((seconds.mean(), seconds.max(), training.mean(), training.max(), iterations, kv_tokens))
    rollout, slowest_rollout, trained, slowest_training, iterations, _ = np.mean(rows, axis=0).tolist()
    return Steps(
        workers=workers,
        completions=batch.prompts * batch.generations,
        rollout=rollout,
        rollout_wait=slowest_rollout - rollout,
        training=trained,
        training_wait=slowest_training - trained,
        network=network_seconds(model, batch, workers, network),
        iterations=iterations,
        kv_tokens=max(row[-1] for row in rows),
    )
