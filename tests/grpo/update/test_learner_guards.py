"""What the learner does with updates that guards or vetoes object to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_groups import random_groups, with_logprobs

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner

# The sampler's log-probabilities are made up: only the gradient is judged.
GRADIENT_ONLY = {
    f"{alarm}_{limit}": None
    for alarm in ("sampler_kl", "sampler_ratio", "effective_sample_size")
    for limit in ("watch", "stop")
}


@pytest.fixture
def make_learner(make_policy) -> Callable[..., Learner]:
    """A learner on a policy with a strong adapter; the made-up log-probabilities are not corrected."""

    def make(**options: Any) -> Learner:
        policy: Policy = make_policy("llama")
        policy.write_slots()
        values: dict[str, Any] = {"mode": "none", "guards": {"enabled": False}, **options}
        return Learner(policy, GRPOConfig(**values))

    return make


@pytest.fixture
def groups() -> list[Group]:
    return random_groups([(7, [5, 1, 9]), (3, [3, 6])])


def test_further_iterations_are_judged_too(make_learner, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of a second iteration that is far beyond the usual is not applied, and said."""
    learner: Learner = make_learner(num_iterations=3, guards=GRADIENT_ONLY)
    for step in range(6):
        assert learner.update(groups, step=step).metrics["updates"] == 3.0
    before = [master.detach().clone() for master in learner.policy.masters]
    norms, clip = iter([1.0, 1000.0]), learner._clip_gradients
    monkeypatch.setattr(learner, "_clip_gradients", lambda: next(norms) * clip())
    update = learner.update(groups, step=6)
    assert update.metrics["updates"] == 1.0 and update.metrics["update_skipped"] == 0.0
    assert update.metrics["guards/skipped_steps"] == 1.0
    assert any("step 7: skipped a further update (grad_norm" in note for note in update.notes)
    assert any(not one.equal(other) for one, other in zip(before, learner.policy.masters, strict=True))


def test_a_step_without_a_gradient_moves_nothing(make_learner, groups: list[Group]) -> None:
    """Every completion is vetoed: Adam's momentum of earlier steps must not move the policy."""
    learner: Learner = make_learner(veto=1e-4)
    learner.update(groups, step=0)
    before = [master.detach().clone() for master in learner.policy.masters]
    lengths = [len(c.token_ids) for w in groups for c in w.completions if c.token_ids]
    certain = with_logprobs(groups, [torch.full((length,), 50.0) for length in lengths])  # far likelier than the trainer finds
    metrics = learner.update(certain, step=1).metrics
    assert metrics["sampling/left_out_ratio"] == 1.0 and metrics["grad_norm"] == 0.0
    assert metrics["updates"] == 0.0 and metrics["update_skipped"] == 1.0
    assert all(one.equal(other) for one, other in zip(before, learner.policy.masters, strict=True))
