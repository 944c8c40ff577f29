"""Guards over made-up runs: calm steps, with some values changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankup.grpo.config.guards import GuardsConfig
from rankup.grpo.guards.decision import Decision, SnapshotKind
from rankup.grpo.guards.guards import Guards
from rankup.grpo.guards.rules import RULES
from rankup.grpo.guards.trackers import Level

CALM = {
    "reward": 0.5,
    "sampler_kl": 0.002,
    "sampler_ratio": 1.04,
    "effective_sample_size": 0.95,
    "grad_norm": 0.2,
    "entropy": 1.0,
    "advantage_scale": 0.2,
    "length": 100.0,
    "zero_variance": 0.3,
}
METRICS = {rule.name: rule.metric for rule in RULES}


class StepsOnly:
    """A snapshot store that keeps no tensors, only the step of each snapshot."""

    def __init__(self) -> None:
        self.steps: dict[SnapshotKind, int] = {}

    def take(self, kind: SnapshotKind, step: int) -> None:
        self.steps[kind] = step

    def restore(self, kind: SnapshotKind) -> int:
        return self.steps[kind]


class Played:
    """Guards that inspect one made-up step after another, with calm values by default, and apply the decisions."""

    def __init__(self, **config: Any) -> None:
        self.snapshots = StepsOnly()
        self.guards = Guards(GuardsConfig(**config), self.snapshots)
        self.step = 0
        self.decisions: list[Decision] = []

    def steps(self, count: int = 1, /, **values: float | None) -> list[Decision]:
        """Inspect `count` equal steps; returns their decisions."""
        for _ in range(count):
            quantities = {METRICS[name]: value for name, value in (CALM | values).items()}
            self.decisions.append(self.guards.inspect(self.step, quantities))
            self.guards.apply(self.decisions[-1])
            self.step += 1
        return self.decisions[-count:]

    def evaluate(self, rewards: Sequence[float | None]) -> Decision:
        """Inspect an evaluation after the steps so far."""
        decision = self.guards.inspect_evaluation(self.step, rewards)
        self.guards.apply(decision)
        self.decisions.append(decision)
        return decision

    def metric(self, name: str) -> float:
        return self.guards.metrics()[f"guards/{name}"]


def after_calm(**config: Any) -> Played:
    played = Played(**config)
    played.steps(20)
    return played


def rise(played: Played, *, steps: int = 30, **values: float) -> list[Decision]:
    """The reward goes from 0.1 to 0.8, the entropy down to a twentieth and the advantages' scale up to ten times its start."""
    decisions = played.steps(6, reward=0.1)
    for step in range(1, steps + 1):
        share = step / steps
        moving = {"reward": 0.1 + 0.7 * share, "entropy": 1 - 0.95 * share, "advantage_scale": 0.2 + 1.8 * share}
        decisions += played.steps(**(moving | values))
    return decisions


def triggered(decisions: list[Decision]) -> list[tuple[str, Level]]:
    return [(alarm.name, alarm.level) for decision in decisions for alarm in decision.alarms]
