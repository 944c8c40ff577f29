"""The alarms as a table: which metric each reads, what is made of it, and what kind of alarm it is. Limits are configured.

    for rule in RULES:
        watch, stop = config.guards.limits(rule.name)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """One alarm: the metric that it reads, what is made of it, and what kind of alarm it is."""

    name: str
    metric: str
    kind: Literal["batch", "policy", "advice"]
    measure: Literal["value", "over_running_mean", "long_mean", "over_start", "lost_gain"]
    text: str
    """How a value reads after the name; {value} is the judged one, {metric} the metric's own."""
    held_at_best: bool = False
    """Not judged while the reward is at its best: a policy that gets better also becomes surer of itself."""
    relative: tuple[float, float] | None = None
    """(origin, factor): `watch` also needs `origin + factor * (start - origin)`, since what bf16 costs differs by model."""


# The reward comes first: other rules ask how it does.
RULES = (
    Rule("reward", "reward", "policy", "lost_gain", "{metric:.3g}: {value:.2f} of what was gained is lost"),
    Rule("sampler_kl", "sampling/kl", "batch", "value", "{metric:.3g}", relative=(0.0, 2.0)),
    Rule("sampler_ratio", "sampling/mean_exp_abs_difference", "batch", "value", "{metric:.3g}", relative=(1.0, 1.5)),
    Rule("effective_sample_size", "sampling/effective_sample_size", "batch", "value", "{metric:.2f}"),
    Rule("grad_norm", "grad_norm", "batch", "over_running_mean", "{metric:.3g} is {value:.1f} times its running mean"),
    Rule("entropy", "entropy", "policy", "over_start", "{metric:.2g} is {value:.2f} of its start", held_at_best=True),
    Rule(
        "advantage_scale",
        "advantage_scale",
        "policy",
        "over_start",
        "{metric:.3g} is {value:.1f} times its start",
        held_at_best=True,
    ),
    Rule("length", "completions/mean_length", "policy", "over_start", "{metric:.0f} tokens are {value:.1f} times its start"),
    Rule("zero_variance", "frac_reward_zero_std", "advice", "long_mean", "{value:.2f} of the groups teach nothing"),
)
