"""One step of a learner, as the loop makes it: backward, the guards' decision, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankup.grpo.data.groups import Group
from rankup.grpo.guards.decision import Decision
from rankup.grpo.update.learner import Learner


@dataclass(frozen=True)
class Stepped:
    """What a step gave: all its metrics, its notes and the decision."""

    metrics: dict[str, float]
    notes: tuple[str, ...]
    decision: Decision


def update(
    learner: Learner, groups: Sequence[Group], *, step: int, observed: Mapping[str, float] | None = None
) -> Stepped:
    """Train on the groups once. `observed`: metrics of the rollouts, for the guards."""
    gradients = learner.backward(groups)
    decision = learner.guards.inspect(step, {**(observed or {}), **gradients.metrics()})
    applied = learner.apply(decision, gradients, step=step)
    return Stepped({**gradients.metrics(), **applied.metrics}, applied.notes, decision)
