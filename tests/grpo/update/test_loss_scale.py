"""float16: the loss scale keeps gradients that bf16 would have, changes nothing else, and gives way to overflows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.grpo.update.loss_scale import GROWTH_INTERVAL, LossScale
from rankup.grpo.update.step_packs import make_packs

SHAPES = [(7, [5, 1, 9, 4]), (3, [3, 6]), (12, [2, 8])]

# The sampler's log-probabilities are made up: only the gradient is judged.
GRADIENT_ONLY = {f"{alarm}_stop": None for alarm in ("sampler_kl", "sampler_ratio", "effective_sample_size")}


@pytest.fixture
def make_learner(make_policy) -> Callable[..., Learner]:
    """A learner on a policy with a strong adapter; the made-up log-probabilities are not corrected, and not judged."""

    def make(kind: str = "llama", *, dtype: Literal["float16", "float32"] = "float16", **options: Any) -> Learner:
        policy: Policy = make_policy(kind, dtype=dtype, **options.pop("lora", {}))
        policy.write_slots()
        values: dict[str, Any] = {"mode": "none", "veto": 0.0, "guards": {"enabled": False}, **options}
        return Learner(policy, GRPOConfig(dtype=dtype, **values))

    return make


def weighted(groups: list[Group], factor: float) -> list[Group]:
    """The groups with all advantages multiplied: their gradients are multiplied too."""
    return [replace(group, advantages=tuple(factor * one for one in group.advantages)) for group in groups]


def gradient(learner: Learner) -> torch.Tensor:
    return torch.cat([master.grad.flatten() for master in learner.policy.masters if master.grad is not None])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0).item()


# The scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "gspo", "entropy_coef": 0.1}, {"lora": {"targets": ["lm_head", "q_proj", "down_proj"]}, "veto": 1e-4}],
)
def test_scaled_gradients_are_a_power_of_two_times_the_others(make_learner, dtype: str, options: dict[str, Any]) -> None:
    """Where the range is wide enough the scale rounds nothing, in any term of the loss."""
    groups, found = random_groups(SHAPES), []
    for scale in (None, 1.0, 2.0**16):
        learner: Learner = make_learner(dtype=dtype, tokens_per_pack=25, **{**options, "max_grad_norm": 1e9})
        assert learner.loss_scale is None, "only float16 has one"
        learner.loss_scale = None if scale is None else LossScale(scale)
        stats = learner.backward(groups).stats
        assert stats is not None
        found.append((gradient(learner), stats))
    for scaled, stats in found[1:]:
        assert torch.equal(scaled, found[0][0]) and stats == found[0][1]


def test_float16_gradients_are_closer_to_fp32_than_those_of_bf16(make_learner) -> None:
    groups, found = random_groups(SHAPES), {}
    for dtype in ("float32", "bfloat16", "float16"):
        learner: Learner = make_learner("qwen2", dtype=dtype)
        learner.backward(groups)
        found[dtype] = gradient(learner)
    errors = {dtype: (found[dtype] - found["float32"]).norm() / found["float32"].norm() for dtype in ("bfloat16", "float16")}
    assert 0 < errors["float16"] < 0.3 * errors["bfloat16"], errors


def test_small_gradients_need_the_scale(make_learner) -> None:
    """Advantages so small that every gradient of a hidden state is below the smallest number of float16."""
    groups, found = weighted(random_groups(SHAPES), 1e-6), {}
    for name, scale in (("without", 1.0), ("with", 2.0**16)):
        learner: Learner = make_learner(initial_loss_scale=scale)
        learner.backward(groups)
        found[name] = gradient(learner)
    exact: Learner = make_learner(dtype="float32")
    exact.backward(groups)
    assert cosine(found["with"], gradient(exact)) > 0.9999
    assert cosine(found["without"], gradient(exact)) < 0.9


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_an_update_in_float16_makes_good_completions_likelier(make_learner, kind: str) -> None:
    good, bad = random_groups([(5, [6, 4]), (5, [6, 4])])
    groups = [replace(good, advantages=(1.0, 1.0)), replace(bad, advantages=(-1.0, -1.0))]
    learner: Learner = make_learner(kind, learning_rate=1e-3)
    (one,) = make_packs(learner.policy, groups, 4096)
    before, _ = learner.policy.logprobs(one)
    metrics = learner.update(groups, step=0).metrics
    learner.policy.write_slots()
    change = learner.policy.logprobs(one)[0] - before
    assert change[:10].sum() > 0.1 and change[10:].sum() < -0.1
    assert metrics["updates"] == 1.0 and metrics["loss_scale"] == 2.0**16 and metrics["loss_scale/overflows"] == 0.0


# Overflows


def test_an_overflow_repeats_the_pass_with_half_the_scale(make_learner) -> None:
    """The update is that of a run which began with the lower scale, and guards see no number that is not finite."""
    groups = weighted(random_groups(SHAPES), 100.0)
    learner: Learner = make_learner(initial_loss_scale=2.0**24, guards=GRADIENT_ONLY)
    update = learner.update(groups, step=0)
    assert learner.loss_scale is not None
    scale, overflows = learner.loss_scale.value, int(update.metrics["loss_scale/overflows"])
    assert overflows > 1 and scale == 2.0**24 / 2**overflows == update.metrics["loss_scale"]
    assert update.metrics["updates"] == 1.0 and update.metrics["update_skipped"] == 0.0
    assert math.isfinite(update.metrics["grad_norm"]) and update.metrics["guards/skipped_steps"] == 0.0
    expected = f"step 1: the backward pass overflowed float16 {overflows} times: the loss scale is {scale:g} now"
    assert expected in update.notes

    other: Learner = make_learner(initial_loss_scale=scale)
    metrics = other.update(groups, step=0).metrics
    assert metrics["loss_scale/overflows"] == 0.0
    assert all(map(torch.equal, learner.policy.masters, other.policy.masters))
    assert (metrics["loss"], metrics["grad_norm"]) == (update.metrics["loss"], update.metrics["grad_norm"])


def test_further_iterations_repeat_their_passes_too(make_learner) -> None:
    learner: Learner = make_learner(num_iterations=3, learning_rate=1e-6)
    assert learner.loss_scale is not None
    gradients = learner.backward(weighted(random_groups(SHAPES), 100.0))
    learner.loss_scale.value = 2.0**24  # too high from the second iteration on
    update = learner.apply(learner.guards.inspect(0, gradients.metrics()), gradients, step=0)
    assert update.metrics["updates"] == 3.0 and update.metrics["loss_scale/overflows"] > 0


def test_gradients_that_no_scale_saves_are_skipped(make_learner) -> None:
    """The next step starts with the scale from before: such a batch says nothing about it."""
    learner: Learner = make_learner()
    before = [master.detach().clone() for master in learner.policy.masters]
    update = learner.update(weighted(random_groups(SHAPES), 1e9), step=0)
    assert update.metrics["updates"] == 0.0 and update.metrics["loss_scale"] == 2.0**16
    assert any("skipped the update (the gradient is not finite)" in note for note in update.notes)
    assert any("step 1: activations or gradients leave float16's range (65504) at any loss scale" in n for n in update.notes)
    assert all(map(torch.equal, before, learner.policy.masters))
    assert learner.update(random_groups(SHAPES), step=1).metrics["updates"] == 1.0


def test_a_forward_pass_that_overflows_is_not_repeated(make_learner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner: Learner = make_learner()
    with torch.no_grad():
        for layer in learner.policy.layers.values():
            layer.master_b.mul_(1e5)
    learner.policy.write_slots()
    passes, one_pass = [], learner._one_pass
    monkeypatch.setattr(learner, "_one_pass", lambda *arguments: passes.append(1) or one_pass(*arguments))
    update = learner.update(random_groups(SHAPES), step=0)
    assert len(passes) == 1 and not math.isfinite(update.metrics["loss"])
    assert update.metrics["updates"] == 0.0 and update.metrics["loss_scale"] == 2.0**16
    assert any("set model.dtype=bfloat16" in note for note in update.notes)


# Its state


def test_the_scale_doubles_after_steps_without_overflow() -> None:
    scale = LossScale(256.0)
    assert scale.halve(256.0)
    assert scale.end_step(0, is_finite=True) != ()
    for step in range(1, GROWTH_INTERVAL):
        scale.end_step(step, is_finite=True)
        assert scale.value == 128.0
    scale.end_step(GROWTH_INTERVAL, is_finite=True)
    assert scale.value == 256.0
    assert scale.halve(256.0) and scale.end_step(GROWTH_INTERVAL + 1, is_finite=True) == (), "expected after a doubling"
    assert scale.halve(128.0) and scale.end_step(GROWTH_INTERVAL + 2, is_finite=True) != (), "lower than ever before"


def test_a_step_that_fails_changes_no_state() -> None:
    """A checkpoint that an error saves is that of the last complete step."""
    scale = LossScale(2.0**16)
    before = scale.state_dict()
    scale.halve(2.0**16)
    assert scale.state_dict() == before
    scale.end_step(0, is_finite=True)
    assert scale.state_dict()["value"] == 2.0**15


def test_a_restored_scale_goes_on_like_the_original() -> None:
    scale, restored = LossScale(2.0**16), LossScale(2.0**10)
    scale.halve(2.0**16)
    for step in range(70):
        scale.end_step(step, is_finite=True)
    restored.load_state_dict(scale.state_dict())
    for step in range(70, 250):
        assert restored.end_step(step, is_finite=True) == scale.end_step(step, is_finite=True)
        assert restored.state_dict() == scale.state_dict()
    assert scale.value > 2.0**15
