"""The learner on CUDA in bf16, by the kernels of this card, against the same numbers on the CPU.

Rounding to bf16 moves a gradient by some percent. The plain path on the CPU rounds at the same places, so its distance from
fp32 is the yardstick: the kernels may not be much farther away. `test_cards.py` runs this file on other cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_groups import random_groups

from rankup.grpo.config import GRPOConfig, LoraConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import GradientStats, Learner

SHAPES = [(7, [5, 1, 9, 4]), (3, [3, 6]), (12, [2, 8])]
MAX_RATIO = 1.5  # of the distances from fp32
# The first step of AdamW is the sign of the gradient, which rounding decides where it is small. With an epsilon far above the
# gradient it is proportional to it.
PROPORTIONAL: dict[str, Any] = {"adam_epsilon": 1e4, "learning_rate": 1e3}
OPTIONS: dict[str, Any] = {"lora": LoraConfig(rank=16, alpha=16), "mode": "none", "veto": 0.0, "guards": {"enabled": False}}


@dataclass(frozen=True)
class Outcome:
    """Of one step: log-probabilities of all tokens, gradients and changes of all master weights, each in one vector."""

    stats: GradientStats
    logprobs: torch.Tensor
    gradient: torch.Tensor
    change: torch.Tensor


Outcomes = tuple[Outcome, Outcome, Outcome]
"""Of CUDA in bf16, of the CPU in bf16, and of the CPU in fp32."""


@pytest.fixture(scope="module")
def rounded_model(tiny_model_path) -> Callable[[str], Path]:
    """A kind of tiny model whose weights are numbers of bf16, so that all dtypes compute with the same ones."""
    done: set[Path] = set()

    def path(kind: str) -> Path:
        folder: Path = tiny_model_path(kind)
        if folder not in done:
            file = folder / "model.safetensors"
            save_file({n: w.bfloat16().float() for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
            done.add(folder)
        return folder

    return path


@pytest.fixture
def make_learner(rounded_model) -> Callable[..., Learner]:
    """A learner whose strong random adapter is in numbers of bf16, too."""

    def make(kind: str, device: str, dtype: str, *, load_in: Any = None, checkpoints: bool = False, **options: Any) -> Learner:
        config = GRPOConfig(**OPTIONS | options)
        policy = Policy(
            str(rounded_model(kind)),
            lora=config.lora,
            dtype=dtype,
            device=device,
            load_in=load_in,
            gradient_checkpointing=checkpoints,
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in policy.layers.values():
                b = torch.randn(layer.master_b.shape, generator=generator) * 0.3 / layer.rank**0.5
                layer.master_a.copy_(layer.master_a.bfloat16())
                layer.master_b.copy_(b.bfloat16())
        policy.write_slots()
        return Learner(policy, config)

    return make


@pytest.fixture
def outcomes(make_learner) -> Callable[..., Outcomes]:
    """What a step does in three places."""

    def one(kind: str, device: str, dtype: str, **options: Any) -> Outcome:
        learner: Learner = make_learner(kind, device, dtype, **PROPORTIONAL | options)
        masters = learner.policy.masters
        before = [master.detach().clone() for master in masters]
        groups = random_groups(SHAPES)
        gradients = learner.backward(groups)
        assert gradients.stats is not None and gradients.packs is not None and gradients.packs.old is not None
        logprobs = torch.cat([values.cpu() for values in gradients.packs.old])
        vector = torch.cat([m.grad.flatten().cpu() for m in masters if m.grad is not None])
        learner.apply(learner.guards.inspect(0, gradients.metrics()), gradients, step=0)
        changes = torch.cat([(m.detach() - b).flatten().cpu() for m, b in zip(masters, before, strict=True)])
        return Outcome(gradients.stats, logprobs, vector, changes)

    def of(kind: str, **options: Any) -> Outcomes:
        places = (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32"))
        cuda, plain, exact = (one(kind, device, dtype, **options) for device, dtype in places)
        return cuda, plain, exact

    return of


def distance(one: torch.Tensor, exact: torch.Tensor) -> float:
    return ((one - exact).norm() / exact.norm()).item()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "cohere": ("cohere", {}),
    "mistral": ("mistral", {}),
    "gemma3": ("gemma3", {}),
    "head and embedding": (
        "qwen3",
        {"lora": LoraConfig(rank=16, alpha=16, targets=["q_proj", "lm_head", "embed_tokens"])},
    ),
    "nf4": ("llama64", {"load_in": "nf4"}),
    "checkpointing": ("llama", {"checkpoints": True}),
    "sequences": ("llama", {"loss_type": "gspo", "beta": 0.1, "entropy_coef": 0.01}),
}


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_a_step_is_as_exact_as_on_the_cpu(outcomes: Callable[..., Outcomes], kind: str, options: dict[str, Any]) -> None:
    cuda, plain, exact = outcomes(kind, **options)
    for what in ("logprobs", "gradient", "change"):
        of_cuda, of_plain, of_exact = (getattr(outcome, what) for outcome in (cuda, plain, exact))
        assert 0 < distance(of_cuda, of_exact) <= MAX_RATIO * distance(of_plain, of_exact) < 0.1, what
    assert cuda.stats.loss == pytest.approx(exact.stats.loss, rel=0.02)
    assert cuda.stats.entropy == pytest.approx(exact.stats.entropy, rel=0.02)


def test_steps_in_8_bits_go_where_those_in_32_go(make_learner) -> None:
    changes = []
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        learner: Learner = make_learner("llama", "cuda", "bfloat16", optimizer=optimizer, learning_rate=1e-3)
        before = torch.cat([master.detach().flatten() for master in learner.policy.masters])
        for step in range(2):
            learner.update(random_groups(SHAPES), step=step)
            learner.policy.write_slots()
        changes.append(torch.cat([master.detach().flatten() for master in learner.policy.masters]) - before)
    exact, *others = changes
    for change in others:
        assert torch.nn.functional.cosine_similarity(change, exact, dim=0) > 0.95


def test_a_snapshot_is_restored(make_learner) -> None:
    """Master weights and optimizer state go to host memory and back, so that the next step is the same one."""
    learner: Learner = make_learner("llama", "cuda", "bfloat16", learning_rate=1e-3)
    masters = learner.policy.masters
    learner.update(random_groups(SHAPES), step=0)
    learner.snapshots.take("step", 1)
    results = []
    for _ in range(2):
        learner.snapshots.restore("step")
        learner.policy.write_slots()
        learner.update(random_groups(SHAPES, seed=1), step=1)
        results.append(torch.cat([master.detach().flatten() for master in masters]))
    assert torch.equal(*results)


def test_a_saved_adapter_is_loaded(make_learner, tmp_path: Path) -> None:
    policy: Policy = make_learner("llama", "cuda", "bfloat16").policy
    saved = [master.detach().clone() for master in policy.masters]
    policy.save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        for master in policy.masters:
            master.zero_()
    policy.load_adapter(tmp_path / "adapter")
    assert all(torch.equal(one, other) for one, other in zip(saved, policy.masters, strict=True))
    assert all(master.is_cuda for master in policy.masters)
