"""Groups from the engine, scored as they finish: what training and evaluation both begin with.

    collected = collect(engine, make_scorer(config), rows, config.rollout, seed=(42, step), trainer_state=state)

A group goes to the reward functions as soon as its last completion ends. What runs in processes or on the event loop is
waited for when all groups are sampled; what runs inline is done between two steps of the engine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rewards.combining import Pending, Scores
from ...rewards.contract import Inputs
from ...rewards.loading import RewardSpec
from ...rewards.runner import Scorer
from ...rollout.config import SamplingConfig
from ...rollout.engine import EngineSettings, RolloutEngine, request_seed
from ...rollout.types import PromptGroup
from ..common.world import World
from ..config import GRPOConfig
from ..data.prompts import PromptRow
from ..model.adapters import target_module_names
from ..model.base_model import nf4_names


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """One prompt's row of the data set, its completions, and their scores.

    `is_own`: whether this worker has sampled it; of other groups there is metadata only (`PromptGroup.metadata`).
    """

    row: PromptRow
    group: PromptGroup
    scores: Scores
    is_own: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Groups in the order of their prompts, and the seconds that sampling and scoring took."""

    groups: list[ScoredGroup]
    rollout_seconds: float
    reward_seconds: float


def make_scorer(config: GRPOConfig, functions: RewardSpec | Sequence[RewardSpec] | None = None) -> Scorer:
    """The configured reward functions, or those given, run as the configuration says. Raises what `Scorer` raises."""
    rewards = config.rewards
    return Scorer(
        rewards.entries() if functions is None else functions,  # type: ignore[arg-type]
        weights=rewards.weights,
        base_dir=config.base_dir,
        isolation=rewards.isolation,
        num_workers=rewards.num_workers,
        timeout=rewards.timeout,
        retries=rewards.retries,
        memory_gib=rewards.memory_gib,
        on_error=rewards.on_error,
        rows_per_call=rewards.rows_per_call,
    )


def engine_settings(config: GRPOConfig, model_path: str) -> EngineSettings:
    """What the configuration asks of vLLM.

    Raises:
        ValueError: `lora.targets` is an expression that fits no layer of the model, or one that cannot be adapted.
    """
    return EngineSettings(
        model=model_path,
        rollout=config.rollout,
        target_modules=target_module_names(model_path, config.lora),
        max_rank=config.lora.max_rank,
        dtype=config.model.dtype,
        seed=config.seed,
        max_num_seqs=config.max_num_seqs,
        keep_base_weights=config.model.share_base_weights is True,
        nf4_weights=nf4_names(model_path) if config.model.load_in == "nf4" else (),
    )


def collect(
    engine: RolloutEngine,
    scorer: Scorer,
    rows: Sequence[PromptRow],
    sampling: SamplingConfig,
    *,
    seed: tuple[int, int] | None,
    first_index: int = 0,
    trainer_state: Mapping[str, Any],
    use_adapter: bool = True,
) -> Collected:
    """Sample and score completions for `rows`.

    `seed` is (run seed, step): each request's seed is derived from it and from its place in the step, which `first_index`
    begins.
    """
    seeds = None if seed is None else [request_seed(*seed, first_index + index) for index in range(len(rows))]
    started = time.perf_counter()
    reward_seconds = 0.0
    waiting: dict[int, Pending] = {}
    groups: dict[int, PromptGroup] = {}
    scores: dict[int, Scores] = {}
    prompts = [row.token_ids for row in rows]
    try:
        for group in engine.rollout(prompts, sampling, seeds=seeds, use_adapter=use_adapter):
            scoring_started = time.perf_counter()
            groups[group.index] = group
            waiting[group.index] = scorer.submit(_inputs(rows[group.index], group, trainer_state))
            scores |= _take_finished(waiting)  # a failure that stops the run should do so now
            reward_seconds += time.perf_counter() - scoring_started
        sampled = time.perf_counter()
        scores |= {index: pending.result() for index, pending in waiting.items()}
        reward_seconds += time.perf_counter() - sampled
    except BaseException:  # whatever ends the rollout: nobody waits for these any more
        for pending in waiting.values():
            pending.cancel()
        raise
    seconds = time.perf_counter() - started
    return Collected(
        groups=[ScoredGroup(row=rows[i], group=groups[i], scores=scores[i]) for i in sorted(groups)],
        rollout_seconds=seconds - reward_seconds,
        reward_seconds=reward_seconds,
    )


def together(own: Collected, rows: Sequence[PromptRow], world: World) -> Collected:
    """The groups of all workers for `rows`, of which each has collected its share: its own in full, the others' as metadata."""
    if world.size == 1:
        return own
    metadata = world.gather([(g.group.metadata(), dataclasses.replace(g.scores, extras={})) for g in own.groups])
    others = [
        ScoredGroup(row=row, group=group, scores=scores, is_own=False)
        for row, (group, scores) in zip(rows, metadata, strict=True)
    ]
    share = world.shard(len(rows))
    groups = [*others[: share.start], *own.groups, *others[share.stop :]]
    return dataclasses.replace(own, groups=groups)


def _take_finished(waiting: dict[int, Pending]) -> dict[int, Scores]:
    """Remove from `waiting` what is finished; returns its scores."""
    finished = [index for index, pending in waiting.items() if pending.is_finished()]
    return {index: waiting.pop(index).result() for index in finished}


def _inputs(row: PromptRow, group: PromptGroup, trainer_state: Mapping[str, Any]) -> Inputs:
    count = len(group.completions)
    texts = [completion.text for completion in group.completions]
    conversational = not isinstance(row.prompt, str)
    return Inputs(
        prompts=[row.prompt] * count,
        completions=[[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        completion_ids=[list(completion.token_ids) for completion in group.completions],
        columns={name: [value] * count for name, value in row.columns.items()},
        trainer_state=trainer_state,
    )
