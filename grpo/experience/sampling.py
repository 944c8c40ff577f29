"""The sampled groups of a rollout, whether a completion is one answer or an episode.

    for sampled in sampled_groups(engine, None, prompts, config.rollout, seeds=seeds):
        ...
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from ...rollout.config import SamplingConfig
from ...rollout.protocol import Engine
from ..data.prompts import Prompt
from ..episodes.groups import Episodes, PlayedGroup


def sampled_groups(
    engine: Engine,
    episodes: Episodes | None,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int] | None,
    use_adapter: bool = True,
) -> Generator[PlayedGroup]:
    """Each group when its last completion has ended. `episodes`: None: a completion is one answer."""
    if episodes is not None:
        with closing(episodes.play(engine, prompts, sampling, seeds=seeds, use_adapter=use_adapter)) as played:
            yield from played
        return
    if sampling.temperature == 0:
        seeds = None  # nothing is drawn
    for group in engine.rollout([prompt.token_ids for prompt in prompts], sampling, seeds=seeds, use_adapter=use_adapter):
        prompt, count = prompts[group.index], len(group.completions)
        yield PlayedGroup(
            index=group.index,
            prompt=prompt,
            completions=group.completions,
            contents=[prompt.content] * count,
            environments=[None] * count,
        )
