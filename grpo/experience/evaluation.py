"""Greedy completions of the evaluation data, and their rewards.

    evaluation = evaluate(session.engine, scorer, eval_prompts, config, step=20)
    evaluation.mean_reward, evaluation.failures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...rewards.runner import Scorer
from ...rollout.protocol import Engine
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.prompts import Prompt
from ..guards.evaluations import Rewards, mean_reward
from .collect import collect
from .step_metrics import failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Rewards in the order of the evaluation data, and by function why it failed on completions."""

    rewards: Rewards
    failures: dict[str, list[str]]

    @property
    def mean_reward(self) -> float:
        """Mean over the prompts that have a reward; NaN if none has."""
        return mean_reward(self.rewards)


def evaluate(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    *,
    step: int,
    use_adapter: bool = True,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """Sample one greedy completion of each prompt, with or without the adapter, and score it. `step`: updates done.

    Each worker takes its shard of the prompts; all get the complete evaluation.
    """
    groups = collect(
        engine,
        scorer,
        prompts,
        config.rollout.greedy(),
        seeds=None,
        trainer_state={"global_step": step, "max_steps": config.optim.max_steps},
        use_adapter=use_adapter,
        world=world,
    ).groups
    return Evaluation(rewards=[reward for group in groups for reward in group.scores.total], failures=failures(groups))
