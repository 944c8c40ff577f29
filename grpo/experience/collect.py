"""Groups sampled by the engine and scored as they finish.

    collected = collect(engine, scorer, prompts, config.rollout, seeds=seeds, trainer_state=state, world=world)

A group goes to the reward functions as soon as its last completion ends. Functions in processes or on the event loop are
awaited after all groups are sampled; functions in this process run between two steps of the engine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rewards.combining import Scores
from ...rewards.runner import Scorer
from ...rollout.config import SamplingConfig
from ...rollout.protocol import Engine
from ..common.world import World
from ..data.groups import Group
from ..data.prompts import Prompt
from ..episodes.groups import Episodes, PlayedGroup
from .sampling import sampled_groups
from .scoring import PendingGroup, submit, with_same_functions


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Scored groups in the order of their prompts, and the seconds that sampling and scoring took."""

    groups: list[Group]
    rollout_seconds: float
    reward_seconds: float


def collect(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    episodes: Episodes | None = None,
    seeds: Sequence[int] | None,
    trainer_state: Mapping[str, Any],
    use_adapter: bool = True,
    set_scorers: Mapping[str, Scorer] | None = None,
    with_texts: bool = False,
    world: World,
) -> Collected:
    """Sample and score completions of the prompts, of which each worker takes its shard; the groups of others as metadata.

    Args:
        episodes: None: a completion is one answer.
        set_scorers: those of evaluation sets that have their own functions, by name.
        with_texts: metadata has the texts of completions, and the columns that reward functions logged.
    """
    of_sets = set_scorers or {}
    shard = world.shard(len(prompts))
    local = prompts[shard]
    started = time.perf_counter()
    reward_seconds = 0.0
    waiting: dict[int, PendingGroup] = {}
    found: dict[int, PlayedGroup] = {}
    scores: dict[int, Scores] = {}
    seeds = None if seeds is None else seeds[shard]
    groups = sampled_groups(engine, episodes, local, sampling, seeds=seeds, use_adapter=use_adapter)
    try:
        for sampled in groups:
            scoring_started = time.perf_counter()
            found[sampled.index] = sampled
            scorer_of_set = of_sets.get(sampled.prompt.eval_set or "", scorer)
            waiting[sampled.index] = submit(scorer_of_set, sampled, trainer_state)
            sampled.release()  # only functions in this process look at environments, and they have finished
            scores |= _take_finished(waiting)  # a failure that stops the run should do so now
            reward_seconds += time.perf_counter() - scoring_started
        sampled_all = time.perf_counter()
        scores |= {index: pending.result() for index, pending in waiting.items()}
        reward_seconds += time.perf_counter() - sampled_all
    except BaseException:  # the rollout failed or was interrupted: no caller awaits these any more
        for pending in waiting.values():
            pending.cancel()
        groups.close()
        raise
    seconds = time.perf_counter() - started
    scored = [Group(prompt=found[i].prompt, completions=found[i].completions, scores=scores[i]) for i in sorted(found)]
    return Collected(
        groups=with_same_functions(_gathered(scored, prompts, world, with_texts=with_texts)),
        rollout_seconds=seconds - reward_seconds,
        reward_seconds=reward_seconds,
    )


def _gathered(local: list[Group], prompts: Sequence[Prompt], world: World, *, with_texts: bool) -> list[Group]:
    """The groups of all workers for `prompts`; remote ones as metadata."""
    if world.size == 1:
        return local
    metadata = world.gather(
        [
            (
                tuple(c.metadata(with_text=with_texts) for c in group.completions),
                group.scores if with_texts else dataclasses.replace(group.scores, extras={}),
            )
            for group in local
        ]
    )
    remote = [
        Group(prompt=prompt, completions=completions, scores=scores, is_local=False)
        for prompt, (completions, scores) in zip(prompts, metadata, strict=True)
    ]
    shard = world.shard(len(prompts))
    return [*remote[: shard.start], *local, *remote[shard.stop :]]


def _take_finished(waiting: dict[int, PendingGroup]) -> dict[int, Scores]:
    """Remove finished calls from `waiting`; returns its scores."""
    finished = [index for index, pending in waiting.items() if pending.is_finished()]
    return {index: waiting.pop(index).result() for index in finished}
