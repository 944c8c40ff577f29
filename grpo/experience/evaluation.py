"""Completions of the evaluation data, greedy by default, and their rewards.

    evaluation = evaluate(session.engine, scorer, eval_prompts, config, step=20)
    evaluation.mean_reward, evaluation.failures
    evaluation.metrics()            # {"eval_reward": 0.4, "eval_reward_low": 0.33, ..., "eval_easy_reward": 0.7, ...}
    evaluation.estimates["pass@4"]  # Estimate(mean=0.6, low=0.5, high=0.7)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...rewards.runner import Scorer
from ...rollout.engine import request_seed
from ...rollout.protocol import Engine
from ..algorithm.estimates import Estimate
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig, eval_sampling
from ..data.groups import Group
from ..data.prompts import Prompt
from ..episodes.groups import Episodes
from ..guards.evaluations import Rewards, mean_reward
from .collect import collect
from .episode_metrics import episode_metrics, void_failures
from .estimates import estimates_of, prompt_rewards
from .step_metrics import completion_metrics, failures, scored_shares

EVALUATION = -1
"""In the place of a step, in the seeds of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scored completions of the evaluation data, the same in every worker.

    Attributes:
        groups: one for each prompt, in the order of the data; remote ones as metadata with the texts.
        seconds: time that sampling and scoring took.
        pass_reward: a completion passes if its reward is at least this.
        functions: names of the reward functions of each set that has its own; those of the run under None.
    """

    groups: list[Group]
    seconds: float
    pass_reward: float = 1.0
    functions: Mapping[str | None, Sequence[str]] = field(default_factory=dict)

    @property
    def rewards(self) -> Rewards:
        """Of each completion, in the order of the evaluation data."""
        return [reward for group in self.groups for reward in group.scores.total]

    @property
    def prompt_rewards(self) -> Rewards:
        """Of each prompt, the mean reward of its completions: the completions of a prompt are alike, so they are no further
        evidence about the policy than its prompt is."""
        return prompt_rewards(self.groups)

    @cached_property
    def sets(self) -> dict[str, list[Group]]:
        """The groups of each named set."""
        names = dict.fromkeys(group.prompt.eval_set for group in self.groups)
        return {name: [g for g in self.groups if g.prompt.eval_set == name] for name in names if name is not None}

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Mean reward, pass@k and maj@n with their intervals, over all prompts; see `estimates_of`."""
        return estimates_of(self.groups, pass_reward=self.pass_reward)

    @cached_property
    def set_estimates(self) -> dict[str, dict[str, Estimate]]:
        """The same of each named set."""
        return {name: estimates_of(groups, pass_reward=self.pass_reward) for name, groups in self.sets.items()}

    def function_means(self, eval_set: str | None = None) -> dict[str, float]:
        """The mean reward of each function, over all prompts or over those of a set, whose functions they are."""
        groups = self.groups if eval_set is None else self.sets[eval_set]
        names = groups[0].scores.by_function
        if eval_set is not None and self.functions:
            own = self.functions.get(eval_set, self.functions[None])
            of_others = {name for functions in self.functions.values() for name in functions} - set(own)
            names = [name for name in names if name not in of_others]  # environments give rewards too
        return {name: mean_reward([r for group in groups for r in group.scores.by_function[name]]) for name in names}

    @property
    def failures(self) -> dict[str, list[str]]:
        """Why functions failed on completions, by function."""
        return failures(self.groups)

    @property
    def is_complete(self) -> bool:
        """Whether its rewards say something about the policy: no function failed, and no episode is void."""
        return not self.failures and not void_failures(self.groups)

    @property
    def scored_shares(self) -> dict[str, float]:
        """The share of the completions that each function with a weight scored, by its name."""
        return scored_shares(self.groups)

    @property
    def mean_reward(self) -> float:
        """Mean over the prompts that have a reward; NaN if none has."""
        return mean_reward(self.rewards)

    def metrics(self) -> dict[str, float]:
        """Metrics by TRL's names with the prefix `eval_`, and the estimates with `_low` and `_high`; the rewards and estimates
        also of each named set, with `eval_<set>_`.

        A mean is NaN if there is nothing to average.
        """
        completions = completion_metrics(self.groups)
        metrics = {
            **_of_set(self.estimates, self.function_means(), prefix="eval_"),
            "eval_completions/mean_length": completions["completions/mean_length"],
            "eval_completions/clipped_ratio": completions["completions/clipped_ratio"],
            "eval_runtime": self.seconds,
            "eval_samples_per_second": sum(len(group.completions) for group in self.groups) / self.seconds,
            **_spread(self.groups),
            **{f"eval_{name}": value for name, value in episode_metrics(self.groups).items()},
        }
        for name, estimates in self.set_estimates.items():
            metrics |= _of_set(estimates, self.function_means(name), prefix=f"eval_{name}_")
        return metrics


def evaluate(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    *,
    step: int,
    episodes: Episodes | None = None,
    trainer_state: Mapping[str, Any] | None = None,
    use_adapter: bool = True,
    set_scorers: Mapping[str, Scorer] | None = None,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """Sample completions of each prompt, with or without the adapter, and score them: one greedy one, or as the options
    `data.eval_...` say. Each worker takes its shard of the prompts; all get the complete evaluation.

    Args:
        step: updates done.
        trainer_state: of the reward functions; None: only the step.
        set_scorers: those of sets that have their own functions, by name.
    """
    started, of_sets = time.perf_counter(), set_scorers or {}
    groups = collect(
        engine,
        scorer,
        prompts,
        eval_sampling(config),
        episodes=episodes,
        # The same in every evaluation: what differs between two of them is the policy.
        seeds=[request_seed(config.seed, EVALUATION, index) for index in range(len(prompts))],
        trainer_state=trainer_state or {"global_step": step, "max_steps": config.optim.max_steps},
        use_adapter=use_adapter,
        set_scorers=of_sets,
        with_texts=True,
        world=world,
    ).groups
    return Evaluation(
        groups=[group.without_experts() for group in groups],
        seconds=time.perf_counter() - started,
        pass_reward=config.data.eval_pass_reward,
        functions={None: scorer.names, **{name: one.names for name, one in of_sets.items()}},
    )


def _spread(groups: Sequence[Group]) -> dict[str, float]:
    """The standard deviation of the rewards within a prompt's completions, if there are several."""
    rewards = [[reward for reward in group.scores.total if reward is not None] for group in groups]
    spreads = [statistics.stdev(known) for known in rewards if len(known) > 1]
    if not spreads:
        return {}
    return {
        "eval_reward_std": statistics.fmean(spreads),
        "eval_frac_reward_zero_std": statistics.fmean(float(spread == 0) for spread in spreads),
    }


def _of_set(estimates: Mapping[str, Estimate], functions: Mapping[str, float], *, prefix: str) -> dict[str, float]:
    """The metrics of all prompts or of a set."""
    metrics = {}
    for name, estimate in estimates.items():
        bounds = {f"{prefix}{name}_low": estimate.low, f"{prefix}{name}_high": estimate.high}
        metrics |= {f"{prefix}{name}": estimate.mean, **bounds}
    return {**metrics, **{f"{prefix}rewards/{name}/mean": mean for name, mean in functions.items()}}
