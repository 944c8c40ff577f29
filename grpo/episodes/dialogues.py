"""The episodes of a run with tools and environments, played beside each other.

    dialogues = Dialogues(actions, config, tokenizer)                       # proves the chat template
    for played in dialogues.play(engine, prompts, config.rollout, seeds=seeds):
        score(played)
        played.release()                                                    # its environments may be used again
    dialogues.close()
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ...rollout.config import SamplingConfig
from ...rollout.protocol import TurnSampler
from ...rollout.texts import Texts
from ...rollout.turns import play
from ..common.log import logger
from ..config import GRPOConfig
from ..data.prompts import Prompt
from ..data.renderer import PromptRenderer
from .actions import Actions
from .dialect import Dialect
from .episode import Player
from .groups import PlayedGroup, as_extended, behind_shared_prompt
from .kit import Kit, Played

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Dialogues:
    """See the module's docstring.

    Args:
        eos_token_ids: tokens that end a completion in the engine.
        num_workers: workers of the cluster, which share the servers of environments.

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
        num_workers: int = 1,
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

        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._at_most = self._capacity(num_workers)
        if actions.runs_beside:
            logger.info("tools or environments run while other episodes are sampled: the run cannot be repeated bit-exactly")

    @property
    def has_environments(self) -> bool:
        """Whether episodes act in environments."""
        return self.actions.environments is not None

    @property
    def shows_environments(self) -> bool:
        """See `groups.Episodes`. Not if a server admits few: those are used again before a group is complete."""
        return self.has_environments and self._at_most is None

    @property
    def adds_columns(self) -> bool:
        """See `groups.Episodes`."""
        return False

    def play(
        self,
        engine: TurnSampler,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool | Sequence[bool] = True,
    ) -> Generator[PlayedGroup]:
        """Play `sampling.num_generations` episodes of each prompt; yields each group when its last one ends.

        Args:
            seeds: one for each prompt; with them episodes repeat, as far as tools and environments do.
            use_adapter: False samples from the base model; or one for each prompt.
        """
        kit = self._kit(sampling)
        size = sampling.num_generations
        uses = [use_adapter] * len(prompts) if isinstance(use_adapter, bool) else use_adapter
        players = [
            Player(
                kit,
                prompt,
                group=index,
                place=place,
                seed=None if seeds is None else seeds[index],
                policy_version=engine.policy_version,
                use_adapter=uses[index],
            )
            for index, prompt in enumerate(prompts)
            for place in range(size)
        ]
        ended: dict[int, dict[int, Played]] = {}
        is_complete = False
        self.actions.caller.reopen()
        try:
            with (
                self.actions.caller.isolated(seeds[0] if seeds else None) as states,
                engine.requests(sampling, stop_token_ids=self._dialect.closing_ids) as requests,
            ):
                for number, played in play(requests, [player.play() for player in players], at_most=self._at_most):
                    index, place = divmod(number, size)
                    of_group = ended.setdefault(index, {})
                    of_group[place] = played
                    if len(of_group) == size:
                        with states.paused():  # reward functions draw as in a run without episodes
                            yield self._group(index, prompts[index], [of_group[one] for one in range(size)])
                        del ended[index]
            is_complete = True
        finally:
            if not is_complete:
                self._release([played for of_group in ended.values() for played in of_group.values()], reuse=False)

    def _kit(self, sampling: SamplingConfig) -> Kit:
        return Kit(
            rollout=self._config.rollout,
            dialect=self._dialect,
            renderer=self._renderer,
            texts=Texts(self._tokenizer, sampling),
            caller=self.actions.caller,
            tools=self.actions.tools,
            environments=self.actions.environments,
            prompt_column=self._config.data.prompt_column,
            max_completion_length=sampling.max_completion_length,
            is_greedy=sampling.temperature == 0,
            is_limited=self._at_most is not None,
            longest_token=self._longest_token,
        )

    def close(self) -> None:
        """Close all environments and end their threads. The next `play` makes new ones."""
        if self.actions.environments is not None:
            self.actions.environments.close()
        self.actions.caller.close()

    def _capacity(self, num_workers: int) -> int | None:
        """How many episodes of a worker may be open at the same time; None: all of a step.

        Raises:
            ValueError: a server cannot be reached, or admits fewer than one episode of each worker.
        """
        environments, config = self.actions.environments, self._config
        if environments is None:
            return None
        needed = config.optim.prompts_per_step * config.rollout.num_generations
        admitted = environments.capacity(needed)
        if admitted is None:
            return None
        if admitted < num_workers:
            raise ValueError(
                f"rollout.environment: the server admits {admitted} sessions at the same time, and each of {num_workers} "
                "workers needs one: raise its limit, such as max_concurrent_envs of OpenEnv"
            )
        logger.info(
            f"rollout.environment: the server admits {admitted} sessions at the same time, and a step has {needed} episodes: "
            f"no more than {admitted // num_workers * num_workers} are open at once, the others wait"
        )
        return admitted // num_workers

    def _release(self, played: Sequence[Played], *, reuse: bool) -> None:
        for one in played:
            if one.world is not None and self.actions.environments is not None:
                self.actions.environments.release(one.world, reuse=reuse and one.is_reusable)

    def _group(self, index: int, prompt: Prompt, played: Sequence[Played]) -> PlayedGroup:
        ids, completions = [one.prompt_token_ids for one in played], [one.completion for one in played]
        of_group, moved = behind_shared_prompt(prompt, ids, completions)
        contents = [one.content for one in played if not one.completion.is_void]
        if contents and all(content == contents[0] for content in contents):
            of_group = replace(of_group, content=contents[0])  # what is recorded and shown
        return PlayedGroup(
            index=index,
            prompt=as_extended(of_group, [one.content for one in played if not one.completion.is_void]),
            completions=moved,
            contents=[one.content for one in played],
            environments=[None if one.world is None else one.world.instance for one in played],
            release=partial(self._release, played, reuse=True),
        )
