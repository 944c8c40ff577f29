"""What the episodes of a rollout have in common, and what one is when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...rollout.config import RolloutConfig
from ...rollout.texts import Texts
from ...rollout.types import Completion
from ..data.messages import Message
from ..data.renderer import PromptRenderer
from .calls import Caller
from .dialect import Dialect
from .environments import Environments
from .tools import Tool
from .worlds import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What the episodes of a rollout have in common.

    Attributes:
        tools: that the model may call in every episode.
        environments: None: there is no world to act in.
        max_completion_length: of this rollout, sampled and given tokens together.
        is_greedy: nothing is drawn, so turns need no seeds.
        is_limited: few environments may be open: each is given back when its episode has ended, and reward functions, which
            see complete groups, get None in its place.
        longest_token: characters of the longest token: n tokens hold no more than n times as many.
    """

    rollout: RolloutConfig
    dialect: Dialect
    renderer: PromptRenderer
    texts: Texts
    caller: Caller
    tools: Sequence[Tool]
    environments: Environments | None
    prompt_column: str
    max_completion_length: int
    is_greedy: bool
    is_limited: bool
    longest_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """An episode that has ended.

    Attributes:
        prompt_token_ids: its own prompt, which the environment may have extended.
        content: the same as reward functions see it.
        world: its environment, which the caller gives back; None: it has none.
        is_reusable: whether the environment may be used again.
    """

    completion: Completion
    prompt_token_ids: tuple[int, ...]
    content: str | list[Message]
    world: World | None
    is_reusable: bool


class EpisodeError(Exception):
    """The environment failed: the episode is void. The message is the sentence of the note, its cause what was raised."""
