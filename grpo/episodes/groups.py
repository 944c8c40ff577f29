"""What a rollout with episodes yields: `Dialogues` play them with tools and environments, `UserRollouts` by a user's function.

    for played in episodes.play(engine, prompts, config.rollout, seeds=seeds):
        score(played)
        played.release()
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...rewards.logged import plain
from ...rollout.config import SamplingConfig
from ...rollout.protocol import Engine
from ...rollout.types import Completion
from ..data.messages import Message
from ..data.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedGroup:
    """The episodes of one prompt.

    Attributes:
        index: the prompt's place in the list.
        prompt: with the tokens that all of its completions share. If environments extended it in different ways, their tokens
            begin with what they do not share, as given tokens.
        contents: the prompt of each completion, as reward functions see it.
        environments: the instance of each completion; None: it has none.
        columns: further values for reward functions, one for each completion.
        release: called when nobody looks at the environments any more.
    """

    index: int
    prompt: Prompt
    completions: tuple[Completion, ...]
    contents: Sequence[str | list[Message]]
    environments: Sequence[object | None]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None


class Episodes(Protocol):
    """How the completions of a run are sampled if they are more than one answer to one prompt."""

    def play(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool = True,
    ) -> Generator[PlayedGroup]:
        """Play `sampling.num_generations` episodes of each prompt; yields each group when its last one has ended.

        Args:
            seeds: one for each prompt; with them episodes repeat, as far as tools and environments do.
        """
        ...

    @property
    def shows_environments(self) -> bool:
        """Whether reward functions get the environment of each completion."""
        ...

    @property
    def adds_columns(self) -> bool:
        """Whether reward functions get more columns than the data has."""
        ...

    def close(self) -> None:
        """Close all environments. The next `play` makes new ones."""
        ...


def as_extended(prompt: Prompt, contents: Sequence[str | list[Message]]) -> Prompt:
    """The prompt with what the environments have said at its end, if all have said the same: so it is recorded."""
    different = {json.dumps(content): content for content in map(plain, contents)}
    return dataclasses.replace(prompt, content=different.popitem()[1]) if len(different) == 1 else prompt


def behind_shared_prompt(
    prompt: Prompt, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion]
) -> tuple[Prompt, tuple[Completion, ...]]:
    """The prompt with the tokens that the prompts of all completions share; what follows in each is given.

    Prompts of void completions do not count.
    """
    pairs = list(zip(prompts, completions, strict=True))
    counted = [ids for ids, completion in pairs if not completion.is_void]
    if not counted:
        return prompt, tuple(completions)
    shared = _common_prefix(counted)
    moved = tuple(_behind(ids[len(shared) :], completion) for ids, completion in pairs)
    return dataclasses.replace(prompt, token_ids=shared), moved


def _behind(rest: tuple[int, ...], completion: Completion) -> Completion:
    """The completion with the rest of its prompt at its beginning, given."""
    if completion.is_void or not rest:
        return completion
    moved = [(start + len(rest), end + len(rest)) for start, end in completion.given]
    return dataclasses.replace(completion, token_ids=(*rest, *completion.token_ids), given=((0, len(rest)), *moved))


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """At least one token: every sequence is predicted from something."""
    first, last = min(sequences), max(sequences)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    assert length > 0, "the prompts of a group begin alike"
    return first[:length]
