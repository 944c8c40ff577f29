"""Learning rates by role, rank and scale, the schedule, what rescaling the rate promises (the same run at another scale), and
the optimizers: 8-bit state compared with exact AdamW, its memory, and that it is saved and restored bit-exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from sample_groups import random_groups
from tiny_runs import tiny_config

from rankup.grpo.algorithm.losses import Counts
from rankup.grpo.config import GRPOConfig, OptimConfig
from rankup.grpo.model.lora_layers import ADAPTER, Master, Role
from rankup.grpo.model.packing import pack
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.objective import Objective, StepConstants
from rankup.grpo.update.optimizer import (
    is_state_of,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    set_optimizer_tensors,
)
from rankup.grpo.update.schedule import learning_rate
from rankup.grpo.update.session import open_session

MakePolicy = Callable[..., Policy]

# ------------------------------------------------------------------------------------------------------- schedule


def rates(**options: Any) -> list[float]:
    optim = OptimConfig(**{"learning_rate": 1.0, "max_steps": 8} | options)
    return [learning_rate(optim, step) for step in range(optim.max_steps)]


def test_constant_rate() -> None:
    assert rates() == [1.0] * 8
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_rate_falls_to_zero_at_the_end() -> None:
    assert rates(lr_scheduler_type="linear") == [1 - step / 8 for step in range(8)]
    assert rates(lr_scheduler_type="linear", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_rate() -> None:
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(lr_scheduler_type="cosine") == pytest.approx(expected)
    assert rates(lr_scheduler_type="cosine", warmup_steps=6)[5:] == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 7])
def test_every_step_trains_and_the_peak_is_reached(kind: str, warmup_steps: int) -> None:
    values = rates(lr_scheduler_type=kind, warmup_steps=warmup_steps)
    assert max(values) == 1.0 and min(values) > 0.0


# --------------------------------------------------------------------------------------------------------- groups


def rate_by_master(policy: Policy, optim: OptimConfig, *, scheduled: float | None = None) -> dict[tuple[str, str], float]:
    """(layer, "a" or "b") -> learning rate of the next update."""
    optimizer = make_optimizer(policy.master_roles, optim)
    if scheduled is not None:
        set_learning_rate(optimizer, scheduled)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(policy.masters), "each master once"
    return {
        (name.rpartition(".")[2], part): by_id[id(master)]
        for name, layer in policy.layers.items()
        for part, master in (("a", layer.master_a), ("b", layer.master_b))
    }


def test_one_rate_for_all_by_default(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert set(rate_by_master(policy, OptimConfig(), scheduled=3e-5).values()) == {3e-5}
    assert len(make_optimizer(policy.master_roles, OptimConfig()).param_groups) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_settings_are_those_of_the_configuration(make_policy: MakePolicy, optimizer: Any) -> None:
    optim = OptimConfig(optimizer=optimizer, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.1)
    (group,) = make_optimizer(make_policy().master_roles, optim).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_lora_plus_multiplies_the_rate_of_b(make_policy: MakePolicy, optimizer: Any) -> None:
    optim = OptimConfig(optimizer=optimizer, learning_rate=1e-4, lora_plus_ratio=8)
    for (_, part), rate in rate_by_master(make_policy(), optim, scheduled=2e-5).items():
        assert rate == pytest.approx(1.6e-4 if part == "b" else 2e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": 1e-4}, 5e-5),
        ({"learning_rate": 1e-5}, 1e-5),  # never above the others
        ({"learning_rate": 1e-4, "embedding_learning_rate": 3e-4}, 3e-4),
    ],
)
def test_the_embedding_has_a_separate_rate(make_policy: MakePolicy, options: dict[str, float], expected: float) -> None:
    """On the same schedule, and neither LoRA+ nor the scale touches it."""
    policy = make_policy(targets=["embed_tokens", "q_proj"])
    optim = OptimConfig(**options, lora_plus_ratio=4, rescale_learning_rate=True)  # type: ignore[arg-type]
    rates = rate_by_master(policy, optim, scheduled=options["learning_rate"] / 2)
    assert [rates["embed_tokens", part] for part in "ab"] == pytest.approx([expected / 2] * 2)
    assert rates["q_proj", "a"] == options["learning_rate"] / 2


def test_rescaling_uses_the_scale_and_rank_of_each_layer(make_policy: MakePolicy) -> None:
    policy = make_policy(
        rank=16, alpha=32, alpha_pattern={"q_proj": 128, "up_proj": 8}, rank_pattern={"k_proj": 4, "up_proj": 8}
    )
    rates = rate_by_master(policy, OptimConfig(learning_rate=1.0, rescale_learning_rate=True))
    assert {part: rate for (name, part), rate in rates.items() if name == "q_proj"} == {"a": 1.0, "b": 0.25}
    assert rates["up_proj", "b"] == 4.0, "32 / 8, whatever the rank"
    assert rates["k_proj", "b"] == rates["v_proj", "b"] == 1.0, "alpha / rank: the rank cancels"


def test_rescaling_knows_rslora(make_policy: MakePolicy) -> None:
    policy = make_policy(rank=16, alpha=32, use_rslora=True, rank_pattern={"k_proj": 4})
    rates = rate_by_master(policy, OptimConfig(learning_rate=1.0, rescale_learning_rate=True))
    assert (rates["v_proj", "b"], rates["k_proj", "b"]) == (0.25, 0.5)  # 1 / sqrt(rank)


# ---------------------------------------------------------------------------------------------------- equivalence


def trained(make_policy: MakePolicy, *, rescale: bool = False, **lora: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """After five steps, by layer: A, and what the steps have added to `scale * B @ A`."""
    policy = make_policy(strength=0.0, rank=16, **lora)  # B = 0, as adapters begin
    config = GRPOConfig(loss_type="dapo", mode="none", veto=0.0)
    optim = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-30, rescale_learning_rate=rescale)
    optimizer = make_optimizer(policy.master_roles, optim)
    (one,) = pack(random_groups([(5, [6, 4, 9]), (3, [7, 5])]), tokens_per_pack=1000)
    tokens = len(one.targets_N)
    counts = Counts(sequences=5, tokens=tokens, local_tokens=tokens, max_completion_length=10)
    constants = StepConstants(counts=counts, entropy_tokens=tokens)
    for _ in range(5):
        policy.write_slots()
        loss = Objective(config).of(one, constants, old_logprobs_N=None, reference_logprobs_N=None)
        policy.backward(one, loss.token_loss, passes=loss.passes)
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (layer.master_a.detach(), layer.scaling[ADAPTER] * (layer.master_b @ layer.master_a).detach())
        for name, layer in policy.layers.items()
    }


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Relative, over layers, of A and of the products."""
    return max(
        ((x - y).norm() / x.norm()).item() for name in one for x, y in zip(one[name], other[name], strict=True)
    )


# Powers of two as ranks and alphas: scaling gradients by them loses no digit, so Adam divides the same numbers.
OTHER_SCALES = {
    "alpha 256": {"alpha": 256},
    "alpha 4": {"alpha": 4},
    "rsLoRA": {"alpha": 32, "use_rslora": True},
    "rsLoRA, alpha 128": {"alpha": 128, "use_rslora": True},
    "one layer's alpha": {"alpha": 32, "alpha_pattern": {"q_proj": 512, "layers.1.mlp.up_proj": 2}},
}


@pytest.mark.parametrize("lora", OTHER_SCALES.values(), ids=OTHER_SCALES)
def test_a_rescaled_rate_is_the_same_run_at_another_scale(make_policy: MakePolicy, lora: dict[str, Any]) -> None:
    reference = trained(make_policy, alpha=32)
    assert all(product.norm() > 0.1 for _, product in reference.values()), "it must have learnt something"
    assert largest_difference(reference, trained(make_policy, rescale=True, **lora)) < 1e-5
    assert largest_difference(reference, trained(make_policy, **lora)) > 0.1, "without rescaling it is another run"


# ------------------------------------------------------------------------------------------------------ optimizers

A, B = (64, 100), (90, 64)  # 8-bit state in blocks of 256 entries: the last ones are not full
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_masters(shapes: Mapping[Role, tuple[int, int]], *, device: str = "cpu") -> list[Master]:
    """Random master weights of rank 64 and scale 1/2."""
    generator = torch.Generator().manual_seed(0)
    return [
        Master(torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)), role, scaling=0.5, rank=64)
        for role, shape in shapes.items()
    ]


def parameters_of(masters: list[Master]) -> list[torch.Tensor]:
    return [master.parameter for master in masters]


def gradients(masters: list[Master], *, steps: range) -> Iterator[list[torch.Tensor]]:
    """For each step: noise around a mean that entries keep, smaller each time, so that both moments matter."""
    generator = torch.Generator().manual_seed(1)
    means = [torch.randn(master.parameter.shape, generator=generator) for master in masters]
    for step in steps:
        generator.manual_seed(100 + step)
        noise = [torch.randn(mean.shape, generator=generator) for mean in means]
        yield [1e-4 * 0.95**step * (0.3 * mean + other) for mean, other in zip(means, noise, strict=True)]


def train(optimizer: torch.optim.Optimizer, masters: list[Master], *, steps: range) -> None:
    """Updates with a rate that falls by a fiftieth each time."""
    for step, grads in zip(steps, gradients(masters, steps=steps), strict=True):
        for master, grad in zip(masters, grads, strict=True):
            master.parameter.grad = grad.to(master.parameter)
        set_learning_rate(optimizer, 0.01 * 0.98**step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


SETTINGS: dict[str, Any] = {
    "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 2e-5, "weight_decay": 0.2, "lora_plus_ratio": 2.0,
}  # fmt: skip
WRONG = {"adam_beta1": 0.8, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01, "lora_plus_ratio": 1.5}


def exact_movement(**settings: float) -> torch.Tensor:
    """What forty updates of torch's AdamW in fp64 add to A and B, in one vector."""
    masters = make_masters({"a": A, "b": B})
    doubles = [torch.nn.Parameter(master.parameter.detach().double()) for master in masters]
    ratios = [1.0, settings["lora_plus_ratio"]]
    optimizer = torch.optim.AdamW(
        [{"params": [double]} for double in doubles],
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        eps=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
    )
    for step, grads in enumerate(gradients(masters, steps=range(40))):
        for group, ratio, double, grad in zip(optimizer.param_groups, ratios, doubles, grads, strict=True):
            double.grad, group["lr"] = grad.double(), ratio * 0.01 * 0.98**step
        optimizer.step()
    moved = [double - master.parameter for double, master in zip(doubles, masters, strict=True)]
    return torch.cat([one.detach().flatten() for one in moved])


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("adamw_8bit", 0.015)])
def test_each_optimizer_is_adamw(name: Any, tolerance: float) -> None:
    """Compared with fp64; each wrong setting is at least twice as far away as 8 bits may be."""
    masters = make_masters({"a": A, "b": B})
    before = [parameter.detach().clone() for parameter in parameters_of(masters)]
    train(make_optimizer(masters, OptimConfig(optimizer=name, **SETTINGS)), masters, steps=range(40))
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(parameters_of(masters), before, strict=True)])
    exact = exact_movement(**SETTINGS)
    assert ((moved - exact).norm() / exact.norm()).item() < tolerance
    for setting, value in WRONG.items():
        other = exact_movement(**{**SETTINGS, setting: value})
        assert ((other - exact).norm() / exact.norm()).item() > 2 * 0.015, setting


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("adamw", {"a": A}, 8.0),
        ("adamw_8bit", {"a": A}, 2 + 8 / 256),
        ("adamw_8bit", {"a": (8, 100)}, 8.0),  # bitsandbytes: below 4,096 entries nothing is to be saved
        ("adamw_8bit", {"embedding": A}, 8.0),
    ],
)
def test_bytes_of_state(name: Any, shape: dict[Role, tuple[int, int]], expected: float) -> None:
    masters = make_masters(shape)
    optimizer = make_optimizer(masters, OptimConfig(optimizer=name))
    train(optimizer, masters, steps=range(1))
    tensors = optimizer_tensors(optimizer, parameters_of(masters))
    moments = sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith(".step"))
    assert moments / masters[0].parameter.numel() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("begun", [False, True])
def test_state_is_saved_and_restored_bit_exactly(name: Any, begun: bool) -> None:
    """Into a new optimizer, and into one that already has state."""
    old, new = (make_masters({"a": A, "b": (5, 64), "embedding": (64, 80)}) for _ in range(2))
    optimizers = [make_optimizer(masters, OptimConfig(optimizer=name, lora_plus_ratio=2)) for masters in (old, new)]
    train(optimizers[0], old, steps=range(5))
    if begun:
        train(optimizers[1], new, steps=range(3))
    saved = load(save(optimizer_tensors(optimizers[0], parameters_of(old))))
    set_optimizer_tensors(optimizers[1], parameters_of(new), saved)
    with torch.no_grad():
        for one, other in zip(parameters_of(old), parameters_of(new), strict=True):
            other.copy_(one)
    for optimizer, masters in zip(optimizers, (old, new), strict=True):
        train(optimizer, masters, steps=range(5, 10))
    assert all(map(torch.equal, parameters_of(old), parameters_of(new)))
    states = [optimizer_tensors(one, parameters_of(masters)) for one, masters in zip(optimizers, (old, new), strict=True)]
    assert states[0].keys() == states[1].keys() and states[0]["1.step"] == 10
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_state_of_another_kind_is_known_and_not_taken() -> None:
    masters = make_masters({"a": A})
    optimizers = [make_optimizer(masters, OptimConfig(optimizer=name)) for name in ("adamw", "adamw_8bit")]
    for optimizer in optimizers:
        train(optimizer, masters, steps=range(1))
    states = [optimizer_tensors(optimizer, parameters_of(masters)) for optimizer in optimizers]
    assert [[is_state_of(o, state) for state in states] for o in optimizers] == [[True, False], [False, True]]
    assert all(is_state_of(optimizer, {}) for optimizer in optimizers)
    with pytest.raises(AssertionError, match="another kind"):
        set_optimizer_tensors(optimizers[0], parameters_of(masters), states[1])


def test_tokens_without_gradient_do_not_move_an_embedding() -> None:
    """8 bits hold no zero next to other numbers (on CPU), or a zero for small numbers (on CUDA)."""
    masters = make_masters({"embedding": (16, 1024)})
    optimizer = make_optimizer(masters, OptimConfig(optimizer="adamw_8bit"))
    (parameter,) = parameters_of(masters)
    before, seen = parameter.detach().clone(), torch.arange(1024) % 4 == 0
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(16, 1024, generator=generator) * seen
        optimizer.step()
    assert torch.equal(parameter[:, ~seen], before[:, ~seen])
    assert not torch.equal(parameter[:, seen], before[:, seen])


@pytest.mark.parametrize("role", ["a", "embedding"])
def test_a_transposed_gradient_is_one_like_any_other(role: Role) -> None:
    """The embedding's A gets one."""
    plain, transposed = (make_masters({role: A}) for _ in range(2))
    address = transposed[0].parameter.data_ptr()
    for masters in (plain, transposed):
        optimizer = make_optimizer(masters, OptimConfig(optimizer="adamw_8bit"))
        for grads in gradients(masters, steps=range(3)):
            masters[0].parameter.grad = grads[0].t().contiguous().t() if masters is transposed else grads[0]
            optimizer.step()
    assert torch.equal(plain[0].parameter, transposed[0].parameter)
    assert transposed[0].parameter.data_ptr() == address, "the snapshots and the policy hold this very memory"


def test_a_gradient_of_zeros_changes_nothing() -> None:
    """A's, as long as B is zero: in the first step of every run."""
    masters = make_masters({"a": A})
    before = masters[0].parameter.detach().clone()
    optimizer = make_optimizer(masters, OptimConfig(optimizer="adamw_8bit"))
    masters[0].parameter.grad = torch.zeros(A)
    optimizer.step()
    assert torch.equal(masters[0].parameter, before)
    train(optimizer, masters, steps=range(3))
    assert masters[0].parameter.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_paged_state_is_refused_on_a_cpu_before_anything_is_loaded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", optimizer="paged_adamw_8bit")
    with pytest.raises(ValueError, match=r"needs CUDA.*optim\.optimizer=adamw_8bit on cpu"):
        make_optimizer(make_masters({"a": A}), config.optim)
    with pytest.raises(ValueError, match=r"needs CUDA"), open_session(config, str(tmp_path / "no model")):
        pass


@pytest.mark.gpu
@ON_CUDA
def test_paged_state_is_the_8_bit_one_and_stays_paged() -> None:
    results = []
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        masters = make_masters({"a": (128, 1024), "embedding": (128, 1000)}, device="cuda")
        optimizer = make_optimizer(masters, OptimConfig(optimizer=name))  # type: ignore[arg-type]
        train(optimizer, masters, steps=range(3))
        saved = load(save(optimizer_tensors(optimizer, parameters_of(masters))))
        train(optimizer, masters, steps=range(3, 5))
        set_optimizer_tensors(optimizer, parameters_of(masters), saved)
        train(optimizer, masters, steps=range(3, 5))
        is_paged = [getattr(optimizer.state[p]["state1"], "is_paged", False) for p in parameters_of(masters)]
        assert is_paged == [name == "paged_adamw_8bit"] * 2
        results.append([*parameters_of(masters), *optimizer_tensors(optimizer, parameters_of(masters)).values()])
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(*results, strict=True))
