"""Packs of a step: what is counted, and what happens when memory runs out in one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from little_memory import little_memory
from sample_groups import random_groups

from rankup.grpo.common.log import log_to
from rankup.grpo.config import GRPOConfig, OptimConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner, Update
from rankup.grpo.update.step_packs import PackBudget

SHAPES = [(7, [5, 1, 9, 4]), (3, [3, 6]), (12, [2, 8])]
# A step of AdamW with a large epsilon is proportional to the gradient: updates can be compared.
PROPORTIONAL: dict[str, Any] = {"adam_epsilon": 1e4, "learning_rate": 1e3}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "a penalty": {"beta": 0.1},
    "iterations of sequences": {"loss_type": "gspo", "num_iterations": 3, "beta": 0.1},
    "a quantile": {"top_entropy_quantile": 0.3, "num_iterations": 2},
}


@pytest.fixture
def make_learner(make_policy) -> Callable[..., Learner]:
    """A learner on a policy with a strong adapter, published; `options` are `GRPOConfig`'s."""

    def make(kind: str = "llama", **options: Any) -> Learner:
        policy: Policy = make_policy(kind, rank=16)
        policy.write_slots()
        values: dict[str, Any] = {"mode": "none", "veto": 0.0, "guards": {"enabled": False}, **PROPORTIONAL, **options}
        return Learner(policy, GRPOConfig(**values))

    return make


@pytest.fixture
def groups() -> list[Group]:
    return random_groups(SHAPES)


def masters(learner: Learner) -> torch.Tensor:
    return torch.cat([master.detach().flatten() for master in learner.policy.masters])


def assert_the_same(update: Update, expected: Update, learner: Learner, reference: Learner) -> None:
    torch.testing.assert_close(masters(learner), masters(reference), rtol=1e-6, atol=1e-6)
    assert update.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-6)


def test_padding_is_counted(make_learner) -> None:
    metrics = make_learner("falcon").update(random_groups([(5, [4, 2])]), step=0).metrics
    assert (metrics["packing/tokens"], metrics["packing/padding_ratio"]) == (14.0, 2 / 16), "rows of 8 and 6 input tokens"


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", ["llama", "falcon"])
@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_when_memory_runs_out_the_update_is_that_of_smaller_packs_from_the_start(
    make_learner, groups: list[Group], kind: str, fails_in: Any, objective: dict[str, Any]
) -> None:
    """It ended the run."""
    learner: Learner = make_learner(kind, tokens_per_pack=10_000, **objective)
    before = masters(learner)
    with little_memory(24, fails_in=fails_in) as failures:
        update = learner.update(groups, step=0)
    assert failures and max(failures) > 40 and (masters(learner) - before).norm() > 1e-3
    budget = learner.pack_budget.tokens
    assert budget < max(failures) and update.metrics["packing/tokens_per_pack"] == budget
    reference: Learner = make_learner(kind, tokens_per_pack=budget, **objective)
    assert_the_same(update, reference.update(groups, step=0), learner, reference)


def test_log_probabilities_of_the_first_iteration_follow_their_tokens(make_learner, groups: list[Group]) -> None:
    """Memory runs out in the second iteration: the old log-probabilities are of a policy that is gone."""
    objective = {"num_iterations": 2, "beta": 0.1, "learning_rate": 1e5}
    learner, reference = (make_learner(tokens_per_pack=n, **objective) for n in (10_000, 26))
    gradients = learner.backward(groups)
    decision = learner.guards.inspect(0, gradients.metrics())
    with little_memory(24) as failures:
        update = learner.apply(decision, gradients, step=0)
    assert failures == [52] and learner.pack_budget.tokens == 26 and update.metrics["clip_ratio/region_mean"] > 0
    expected = reference.update(groups, step=0)
    torch.testing.assert_close(masters(learner), masters(reference), rtol=1e-5, atol=1e-5)
    assert update.metrics["clip_ratio/region_mean"] == pytest.approx(expected.metrics["clip_ratio/region_mean"])


def test_the_smaller_budget_stays_and_is_told_once(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner(tokens_per_pack=10_000)
    heard: list[str] = []
    with log_to(heard.append), little_memory(24) as failures:
        first, second = (learner.update(groups, step=step) for step in range(2))
    assert len(failures) == len(first.notes) == len(heard) and second.notes == ()
    assert all("memory ran out" in note and "CUDA out of memory" in note for note in first.notes)
    assert second.metrics["packing/tokens_per_pack"] == learner.pack_budget.tokens == 26


def test_a_single_completion_that_does_not_fit_ends_the_run_with_the_remedy(make_learner, groups: list[Group]) -> None:
    learner: Learner = make_learner()
    with little_memory(10), pytest.raises(ValueError, match=r"a single completion, \d+ tokens, do not fit") as caught:
        learner.update(groups, step=0)
    assert "optim.gradient_checkpointing=true" in str(caught.value)
    assert all(master.grad is None for master in learner.policy.masters)


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError])
def test_other_errors_are_not_survived(make_learner, groups: list[Group], error: type[Exception]) -> None:
    learner: Learner = make_learner()
    with little_memory(10, error=error), pytest.raises(error):
        learner.update(groups, step=0)
    assert learner.pack_budget.tokens == 4096


def tensors_in_memory() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_a_failed_pass_leaves_no_activations(make_learner, groups: list[Group]) -> None:
    """Its error has a traceback, whose frames hold them."""
    learner: Learner = make_learner()
    before = tensors_in_memory()
    with little_memory(24):
        learner.update(groups, step=0)
    assert tensors_in_memory() <= before + sum(map(len, learner.optimizer.state.values()))


def test_a_resumed_run_makes_the_packs_that_the_run_made() -> None:
    shrunk, same, other = (PackBudget.of(OptimConfig(tokens_per_pack=n)) for n in (4096, 4096, 2048))
    shrunk.tokens = 512
    for budget in (same, other):
        budget.load_state_dict(shrunk.state_dict())
    assert (same.tokens, other.tokens) == (512, 2048), "configured anew"
    other.load_state_dict({})  # of an earlier version
    assert other.tokens == 2048
