"""Greedy completions of the evaluation data, and what the reward functions say of them.

    evaluation = evaluate(session.engine, scorer, eval_prompts.rows, config, step=20)
    mean_reward(evaluation.rewards), evaluation.failures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...rewards.runner import Scorer
from ...rollout.engine import RolloutEngine
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.prompts import PromptRow
from ..guards.evaluations import Rewards
from .collect import collect, together
from .step_metrics import failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Rewards of the evaluation data in its order, and why functions that failed gave none of their own."""

    rewards: Rewards
    failures: dict[str, list[str]]


def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    rows: Sequence[PromptRow],
    config: GRPOConfig,
    *,
    step: int,
    use_adapter: bool = True,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """Sample one greedy completion of each row, with or without the adapter, and score it. `step`: steps done so far.

    Each of several workers takes its share of the rows; all get the whole evaluation.
    """
    own = collect(
        engine,
        scorer,
        rows[world.shard(len(rows))],
        config.rollout.greedy(),
        seed=None,
        trainer_state={"global_step": step, "max_steps": config.optim.max_steps},
        use_adapter=use_adapter,
    )
    collected = together(own, rows, world)
    rewards = [reward for group in collected.groups for reward in group.scores.total]
    return Evaluation(rewards=rewards, failures=failures(collected.groups))
