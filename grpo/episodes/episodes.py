"""The episodes of a run: its tools and environments, and the groups that are played with them.

    actions = Actions.load(config, tools=[add], environments=Guess)         # None if the run has neither
    episodes = Episodes(actions, config, tokenizer)                         # proves the chat template
    for played in episodes.play(engine, prompts, config.rollout, seeds=seeds):
        score(played)
        episodes.release(played)                                            # its environments may be used again
    episodes.close()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...rollout.config import SamplingConfig
from ...rollout.protocol import Engine
from ...rollout.texts import Texts
from ...rollout.turns import play
from ...rollout.types import Completion
from ..config import GRPOConfig
from ..data.messages import Message
from ..data.prompts import Prompt
from ..data.renderer import PromptRenderer
from .calls import Caller
from .dialect import Dialect
from .environments import EnvironmentFactories, Environments, load_environments
from .episode import Kit, Played, Player
from .tools import Tool, ToolSpec, load_tools, make_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What completions of a run can do: tools to call, and environments to act in."""

    tools: Sequence[Tool]
    environments: Environments | None
    caller: Caller

    @classmethod
    def load(
        cls,
        config: GRPOConfig,
        *,
        tools: Sequence[ToolSpec] | None = None,
        environments: EnvironmentFactories | None = None,
    ) -> Actions | None:
        """Those of a user; None: those of the configuration. None if there are neither.

        Raises:
            ValueError, FileNotFoundError: a tool without type hints or docstring, an environment without `reset`, no such file.
        """
        rollout = config.rollout
        found = make_tools(tools) if tools else load_tools(rollout.tools)
        factories = environments or load_environments(rollout.environment)
        if not found and factories is None:
            return None
        caller = Caller(rollout.tool_timeout, rollout.tool_workers)
        worlds = None if factories is None else Environments(factories, caller)
        return cls(tools=found, environments=worlds, caller=caller)

    def schemas(self, row: Mapping[str, Any]) -> list[Schema]:
        """The tools of a row's prompt.

        Raises:
            ValueError: its column `environment` names none.
        """
        worlds = self.environments
        of_world = [] if worlds is None else worlds.tools(worlds.name_of(row))
        return [tool.schema for tool in [*self.tools, *of_world]]

    def all_schemas(self) -> list[Schema]:
        """Those of all tools that are known before an episode begins."""
        worlds = self.environments
        names = () if worlds is None else worlds.names or (None,)
        of_worlds = [tool for name in names if worlds is not None for tool in worlds.tools(name)]
        return list({str(tool.schema): tool.schema for tool in [*self.tools, *of_worlds]}.values())

    @property
    def responds(self) -> bool:
        """Whether an environment answers turns without a call."""
        return self.environments is not None and self.environments.responds


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedGroup:
    """The episodes of one prompt.

    Attributes:
        index: the prompt's place in the list.
        prompt: with the tokens that all of its completions share. If environments extended it in different ways, their tokens
            begin with what they do not share, as given tokens.
        contents: the prompt of each completion, as reward functions see it.
        environments: the instance of each completion; None: it has none.
    """

    index: int
    prompt: Prompt
    completions: tuple[Completion, ...]
    contents: Sequence[str | list[Message]]
    environments: Sequence[object | None]
    played: Sequence[Played]


class Episodes:
    """See the module's docstring.

    Args:
        eos_token_ids: tokens that end a completion in the engine.

    Raises:
        ValueError: the chat template cannot write these tools or turns, with the reason.
    """

    def __init__(
        self,
        actions: Actions,
        config: GRPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.actions = actions
        self._config = config
        self._tokenizer = tokenizer
        self._renderer = PromptRenderer(tokenizer, config.data)
        self._dialect = Dialect(
            tokenizer,
            config.data,
            schemas=actions.all_schemas(),
            responds=actions.responds,
            tool_parser=config.rollout.tool_parser,
            eos_token_ids=eos_token_ids,
        )

    def play(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool = True,
    ) -> Iterator[PlayedGroup]:
        """Play `sampling.num_generations` episodes of each prompt; yields each group when its last one ends.

        Args:
            seeds: one for each prompt; with them episodes repeat, as far as tools and environments do.
        """
        kit = Kit(
            rollout=self._config.rollout,
            dialect=self._dialect,
            renderer=self._renderer,
            texts=Texts(self._tokenizer, sampling),
            caller=self.actions.caller,
            tools=self.actions.tools,
            environments=self.actions.environments,
            prompt_column=self._config.data.prompt_column,
            max_completion_length=sampling.max_completion_length,
        )
        size = sampling.num_generations
        players = [
            Player(
                kit,
                prompt,
                group=index,
                place=place,
                seed=None if seeds is None else seeds[index],
                policy_version=engine.policy_version,
            )
            for index, prompt in enumerate(prompts)
            for place in range(size)
        ]
        ended: dict[int, dict[int, Played]] = {}
        is_complete = False
        try:
            with (
                self.actions.caller.isolated(),
                engine.requests(sampling, use_adapter=use_adapter, stop_token_ids=self._dialect.closing_ids) as requests,
            ):
                for number, played in play(requests, [player.play() for player in players]):
                    index, place = divmod(number, size)
                    of_group = ended.setdefault(index, {})
                    of_group[place] = played
                    if len(of_group) == size:
                        yield _group(index, prompts[index], [of_group[one] for one in range(size)])
                        del ended[index]
            is_complete = True
        finally:
            if not is_complete:
                self._release([played for of_group in ended.values() for played in of_group.values()], reuse=False)

    def release(self, group: PlayedGroup) -> None:
        """Give its environments back: nobody looks at them any more."""
        self._release(group.played, reuse=True)

    def close(self) -> None:
        """Close all environments and end their threads. The next `play` makes new ones."""
        if self.actions.environments is not None:
            self.actions.environments.close()
        self.actions.caller.close()

    def _release(self, played: Sequence[Played], *, reuse: bool) -> None:
        for one in played:
            if one.world is not None and self.actions.environments is not None:
                self.actions.environments.release(one.world, reuse=reuse and one.is_reusable)


def _group(index: int, prompt: Prompt, played: Sequence[Played]) -> PlayedGroup:
    """The group with the tokens that its prompts share as its prompt; what follows in each is given."""
    prompts = [one.prompt_token_ids for one in played if not one.completion.is_void] or [prompt.token_ids]
    shared = _common_prefix(prompts)
    is_same = all(one.content == played[0].content for one in played)
    of_group = dataclasses.replace(
        prompt, token_ids=shared, content=played[0].content if is_same else prompt.content
    )
    return PlayedGroup(
        index=index,
        prompt=of_group,
        completions=tuple(_behind(shared, one) for one in played),
        contents=[one.content for one in played],
        environments=[None if one.world is None else one.world.instance for one in played],
        played=played,
    )


def _behind(shared: tuple[int, ...], played: Played) -> Completion:
    """The completion behind the shared part of its prompt: the rest of the prompt is given."""
    completion, rest = played.completion, played.prompt_token_ids[len(shared) :]
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
