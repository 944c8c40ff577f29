"""Guards that are fed made-up runs: calm steps, with some values changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankup.grpo.config.guards import GuardsConfig
from rankup.grpo.guards.guards import Guards, Verdict
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


class Played:
    """Guards that are fed step after step, with calm values where nothing else is said; a restore is carried out."""

    def __init__(self, **config: Any) -> None:
        self.guards = Guards(GuardsConfig(**config))
        self.step = 0
        self.verdicts: list[Verdict] = []

    def steps(self, count: int = 1, /, **values: float | None) -> list[Verdict]:
        """Judge so many steps alike; returns their verdicts."""
        for _ in range(count):
            quantities = {METRICS[name]: value for name, value in (CALM | values).items()}
            self.verdicts.append(self.guards.judge(self.step, quantities))
            if self.verdicts[-1].restore:
                self.guards.restored(self.verdicts[-1].restore)
            self.step += 1
        return self.verdicts[-count:]

    def evaluate(self, rewards: Sequence[float | None]) -> Verdict:
        """Judge an evaluation after the steps so far; a restore is carried out."""
        verdict = self.guards.judge_evaluation(self.step, rewards)
        if verdict.restore:
            self.guards.restored(verdict.restore)
        self.verdicts.append(verdict)
        return verdict

    def metric(self, name: str) -> float:
        return self.guards.metrics()[f"guards/{name}"]


def after_calm(**config: Any) -> Played:
    played = Played(**config)
    played.steps(20)
    return played


def rise(played: Played, *, steps: int = 30, **values: float) -> list[Verdict]:
    """The reward goes from 0.1 to 0.8, the entropy down to a twentieth and the advantages' scale up to ten times its start."""
    verdicts = played.steps(6, reward=0.1)
    for step in range(1, steps + 1):
        share = step / steps
        moving = {"reward": 0.1 + 0.7 * share, "entropy": 1 - 0.95 * share, "advantage_scale": 0.2 + 1.8 * share}
        verdicts += played.steps(**(moving | values))
    return verdicts


def rung(verdicts: list[Verdict]) -> list[tuple[str, Level]]:
    return [(alarm.name, alarm.level) for verdict in verdicts for alarm in verdict.alarms]
