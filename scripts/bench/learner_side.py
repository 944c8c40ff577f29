"""The side of `learner.py`: a policy on a base of random weights, made on the device from a `config.json` alone.

    side = LearnerSide(folder, Case(512, 961), rank=64, alpha=32)
    side.time(5)["seconds"], side.memory(shape), side.compare()
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from cases import LAST_TOKEN, Case, randomise_adapter
from common import Result, summarise

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.parts import training_parts
from rankup.grpo.model.base_model import empty_model
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.kernels.cpu_memory import keep_freed_memory

if TYPE_CHECKING:
    from rankup.grpo.memory.shapes import ModelShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT_STD = 0.02
ADAPTER_STD = 0.01
NOT_IN_TENSORS = ("runtime", "gaps", "guards_snapshot")
"""Parts of the plan that torch's allocator does not see, or that this learner, without guards, does not have."""


class LearnerSide:
    """See the module's docstring.

    Args:
        folder: with the `config.json`. With `load_in`, a file of zeros without blocks on the disk is written there, since
            layers in 4 bits are rounded while they are read.
    """

    def __init__(self, folder: str, case: Case, *, rank: int, alpha: int, load_in: Literal["nf4"] | None = None) -> None:
        keep_freed_memory()
        self._config = GRPOConfig(
            lora={"rank": rank, "alpha": alpha},
            model={"name": folder, "dtype": "bfloat16", "load_in": load_in, "share_base_weights": False},
            rollout={
                "num_generations": case.completions,
                "max_prompt_length": case.prompt_tokens,
                "max_completion_length": case.completion_tokens,
            },
            optim={"tokens_per_pack": case.tokens // case.prompts},
            correction={"mode": "none"},  # no engine sampled the tokens
            guards={"enabled": False},
        )
        started = time.perf_counter()
        with quiet_stderr():
            if load_in is None:
                shared = random_weights(folder)
            else:
                shared = None
                write_zeros(folder)
            self._policy = Policy(folder, lora=self._config.lora, device=DEVICE, load_in=load_in, shared=shared)
        fill_packed(self._policy)
        randomise_adapter(self._policy, ADAPTER_STD)
        self._initial = [master.detach().clone() for master in self._policy.masters]
        vocabulary = self._policy.head.weight_VD.shape[0]
        self._groups = case.groups(last_token=min(vocabulary, LAST_TOKEN))
        self._load_seconds = time.perf_counter() - started

    @property
    def fusion(self) -> str:
        """One line about the fused modules."""
        return self._policy.fusion.summary

    def time(self, repeats: int) -> Result:
        """Seconds of steps after a first one, which compiles; loss and gradient norm of the first."""
        learner = self._begin()
        first, metrics = self._step(learner)
        seconds = [self._step(learner)[0] for _ in range(repeats)]
        numbers = {name: metrics[name] for name in ("loss", "grad_norm")}
        is_finite = all(map(math.isfinite, numbers.values())) and metrics["updates"] == 1
        return {
            "seconds": summarise(seconds),
            "first_seconds": first,
            "load_seconds": self._load_seconds,
            "is_finite": is_finite,
            **numbers,
        }

    def memory(self, shape: ModelShape) -> Result:
        """Peak of a step with optimizer state, on CUDA, and the plan's figures for the same sizes."""
        parts = training_parts(shape, self._config, DEVICE)
        tensors = {name: size for name, size in parts.items() if name not in NOT_IN_TENSORS}
        allocated = sum(tensors.values())
        plan = {"parts": parts, "allocated": allocated, "reserved": allocated + parts.get("gaps", 0)}
        if DEVICE == "cpu":
            return {"plan": plan}
        initial_bytes = sum(one.nbytes for one in self._initial)  # kept for the comparisons only
        learner = self._begin()
        self._step(learner)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._step(learner)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"plan": plan, "peak_allocated": peak - initial_bytes, "peak_reserved": reserved - initial_bytes}

    def compare(self, *, deterministic: bool = False) -> Result:
        """Two updates from the same state: which log-probabilities, gradients and weights differ in any bit, and how much."""
        with warnings.catch_warnings(record=True) as caught, _algorithms(deterministic):
            warnings.simplefilter("always")
            first, second = self._update(), self._update()
        compared = {what: _differences(first[what], second[what]) for what in first}
        texts = dict.fromkeys(str(one.message).partition(".")[0] for one in caught if "determinis" in str(one.message))
        return {**compared, "identical": not any(one["different"] for one in compared.values()), "warnings": list(texts)}

    @torch.no_grad()
    def _begin(self) -> Learner:
        """A learner at the initial state."""
        for master, initial in zip(self._policy.masters, self._initial, strict=True):
            master.copy_(initial)
        self._policy.write_slots()
        return Learner(self._policy, self._config)

    def _step(self, learner: Learner) -> tuple[float, Mapping[str, float]]:
        _synchronize()
        started = time.perf_counter()
        metrics = learner.update(self._groups, step=0).metrics
        self._policy.write_slots()
        _synchronize()
        return time.perf_counter() - started, metrics

    def _update(self) -> dict[str, dict[str, torch.Tensor]]:
        learner = self._begin()
        gradients = learner.backward(self._groups)
        assert gradients.packs is not None and gradients.packs.old is not None
        grads = {name: master.grad.clone() for name, master in self._named_masters() if master.grad is not None}
        learner.apply(learner.guards.inspect(0, gradients.metrics()), gradients, step=0)
        return {
            "logprobs": {f"pack {index}": one for index, one in enumerate(gradients.packs.old)},
            "gradients": grads,
            "weights": {name: master.detach().clone() for name, master in self._named_masters()},
        }

    def _named_masters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, layer in self._policy.layers.items():
            yield f"{name}.A", layer.master_a
            yield f"{name}.B", layer.master_b


# -------------------------------------------------------------------------------------------------------------- weights


def random_weights(folder: str) -> dict[str, torch.Tensor]:
    """Weights of the model by name, on the device: ones for norms, zeros for biases, else normal."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    model = empty_model(folder, torch.bfloat16, {})

    def weight(name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16, device=DEVICE)
        empty = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        return empty.normal_(std=WEIGHT_STD, generator=generator)

    return {name: weight(name, parameter.shape) for name, parameter in model.named_parameters()}


def write_zeros(folder: str) -> None:
    """A `model.safetensors` of zeros; the file has a hole where the zeros are."""
    header, end = {}, 0
    for name, parameter in empty_model(folder, torch.bfloat16, {}).named_parameters():
        size = 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(Path(folder, "model.safetensors"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@torch.no_grad()
def fill_packed(policy: Policy) -> None:
    """Random values for weights that were read as zeros. Through `.data`, which torch does not count as a write."""
    if not policy.base.weights or all(weight.dtype != torch.uint8 for weight in policy.base.weights.values()):
        return
    for name, weight in policy.base.weights.items():
        if weight.dtype == torch.uint8:
            weight.data.random_(0, 256)
        elif name.endswith("absmax"):
            weight.data.fill_(2 * WEIGHT_STD)
        elif weight.dim() == 1:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.data.normal_(std=WEIGHT_STD)


# ----------------------------------------------------------------------------------------------------------- comparing


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    if not deterministic:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _differences(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> Result:
    """Largest difference of each tensor that differs, relative to its largest value."""
    different: dict[str, float] = {}
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            largest = tensor.abs().max().item() or 1.0
            different[name] = (tensor - second[name]).abs().max().item() / largest
    return {"tensors": len(first), "different": different}


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
