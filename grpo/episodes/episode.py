"""One episode, from the reset of its environment to its reward: a generator that reads from top to bottom.

    players = [Player(kit, prompt, group=0, place=g, seed=seed, policy_version=3) for g in range(8)]
    play(requests, [player.play() for player in players])       # each ends as a `Played`

A turn is sampled; its calls run, or the environment responds; what they say is given behind it; and the next turn follows,
until the model has ended its turn without a call, the environment is done, or there is no room. Rules and failures:
docs/episodes.md.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ...rewards.texts import content_text
from ...rollout.turns import Play, Request, Turn
from ...rollout.types import Completion, Episode, FinishReason, ToolCallRecord
from ..data.messages import Message, read_template_kwargs
from ..data.prompts import Prompt
from .dialect import Reply
from .kit import EpisodeError, Kit, Played
from .stream import Stream
from .tools import Tool
from .user_code import UserCode, malformed
from .worlds import World, observation_of, rewards_of

Steps = Generator[Request | Future[Any], Any, Any]
LARGEST_SEED = 2**31 - 1
"""Of environments: gymnasium and NumPy take no larger ones everywhere."""


@dataclass(slots=True)
class _Said:
    """What has happened behind the prompt."""

    messages: list[Message] = field(default_factory=list)
    calls: list[ToolCallRecord] = field(default_factory=list)
    turns: int = 0


class Player:
    """One completion of a prompt. `place`: its place in the group; `group`: the group's number in the rollout.

    `seed`: the group's, which is that of all resets; None: nothing is reproducible. `use_adapter`: False: by the base model.
    """

    def __init__(
        self,
        kit: Kit,
        prompt: Prompt,
        *,
        group: int,
        place: int,
        seed: int | None,
        policy_version: int,
        use_adapter: bool = True,
    ) -> None:
        self._kit = kit
        self._prompt = prompt
        self._group, self._place, self._seed = group, place, seed
        self._policy_version = policy_version
        self._use_adapter = use_adapter
        self._said = _Said()
        self._stream = Stream(prompt.token_ids)
        self._content = prompt.content
        self._world: World | None = None
        self._code = UserCode(kit.caller, seed=seed, place=place)
        self._tools: Sequence[Tool] = kit.tools
        self._turn_text = ""

    def play(self) -> Play[Played]:
        """The episode, for `turns.play`."""
        is_over = False
        try:
            yield from self._begin()
            finish_reason = yield from self._turns()
            rewards = yield from self._rewards()
            if self._kit.is_limited:
                self._give_back(reuse=not self._code.has_failed)
            is_over = True
            return self._played(finish_reason, rewards)
        except EpisodeError as error:
            self._give_back(reuse=False)
            return self._void(error)
        finally:
            if not is_over:
                self._give_back(reuse=False)

    def _give_back(self, *, reuse: bool) -> None:
        """Let another episode have the environment, if it may be used again."""
        if self._world is not None and self._kit.environments is not None:
            self._kit.environments.release(self._world, reuse=reuse)
        self._world = None

    # ----------------------------------------------------------------------------------------------------- beginning

    def _begin(self) -> Steps:
        """Reset the environment, and extend the prompt by what it says."""
        environments = self._kit.environments
        if environments is None:
            return
        row = self._prompt.as_row(self._kit.prompt_column)
        name = environments.name_of(row)
        try:
            self._world = environments.acquire(name, seed=self._code.seed_of_draws("acquire"))
        except ValueError as error:
            raise EpisodeError(f"the environment could not be made: {error}") from error
        world = self._world
        seed = None if self._seed is None else self._seed & LARGEST_SEED
        said = yield from self._ask("reset", world.reset, world.reset_arguments(row, seed), seed=self._seed)
        observation = self._checked(said, "reset")
        if self._prompt.is_from_reset and not observation:
            raise EpisodeError(
                f"there is no prompt: the row has no column {self._kit.prompt_column!r}, and reset of {world.class_name} says "
                "nothing: return the prompt from reset, or set data.prompt_column"
            )
        before = [tool.schema for tool in environments.tools(name)]
        self._tools = yield from self._ask("tools", world.tools, {"extra": self._kit.tools}, inline=True)
        schemas = [tool.schema for tool in self._tools]
        if schemas and self._kit.dialect.parser_name is None:
            raise EpisodeError(
                f"{world.class_name} has tools after reset only: declare `tools` in the class, such as tools = ()"
            )
        if observation is None and schemas == [*(tool.schema for tool in self._kit.tools), *before]:
            return
        self._content = self._with_observation(observation)
        try:
            ids = self._kit.renderer.token_ids(self._content, schemas, self._template_kwargs)
        except ValueError as error:
            raise EpisodeError(f"the prompt with what reset says {error}") from error
        longest = self._kit.rollout.max_prompt_length
        if len(ids) > longest:
            raise EpisodeError(
                f"the prompt has {len(ids)} tokens with what reset says, more than rollout.max_prompt_length={longest}"
            )
        self._stream = Stream(ids)

    @property
    def _template_kwargs(self) -> dict[str, Any]:
        return read_template_kwargs(self._prompt.columns.get("chat_template_kwargs"))

    def _with_observation(self, observation: str | list[Message] | None) -> list[Message]:
        """The prompt's messages with what `reset` says: messages, or text that is appended to the last one."""
        messages = self._prompt.content
        if isinstance(messages, str):
            raise EpisodeError("reset says something, but the prompt is plain text: write the prompts as messages")
        if not isinstance(observation, str):
            return [*self._messages_before(observation or []), *(observation or [])]
        last = messages[-1]
        content = last.get("content") or ""
        extended = content + observation if isinstance(content, str) else [*content, {"type": "text", "text": observation}]
        return [*messages[:-1], {**last, "content": extended}]

    def _messages_before(self, observation: Sequence[Message]) -> Sequence[Message]:
        """What stays of the prompt before the messages of `reset`: of a row without a prompt, only the system prompt of the
        configuration, unless they have their own."""
        messages = self._prompt.content
        assert not isinstance(messages, str)
        if not self._prompt.is_from_reset or not observation:
            return messages
        return [] if observation[0]["role"] == "system" else messages[:-1]

    # --------------------------------------------------------------------------------------------------------- turns

    def _turns(self) -> Generator[Request | Future[Any], Any, FinishReason]:
        """All turns, and what is given between them; returns why the episode ended."""
        dialect, iterations = self._kit.dialect, 0
        while True:
            turn: Turn = yield self._request()
            reply = dialect.parse(turn.token_ids, before=self._stream.all, num_calls=len(self._said.calls))
            self._stream.sampled(turn)
            self._said.turns += 1
            self._turn_text = turn.text
            self._said.messages.append(reply.message if reply.calls else {"role": "assistant", "content": turn.text})
            if turn.finish_reason != "stop":
                return turn.finish_reason
            closing = dialect.closing_id(reply)
            is_closed = turn.ended_by_token and turn.token_ids[-1] == closing
            if closing is None or (turn.ended_by_token and not is_closed):
                return "stop"  # behind this turn the template cannot go on
            if not reply.calls and not self._responds:
                return "stop"
            if any(call.error for call in reply.calls) and self._kit.rollout.on_malformed_call == "end":
                self._said.calls += [malformed(call) for call in reply.calls if call.error]
                return "stop"
            limit = self._kit.rollout.max_tool_calling_iterations
            if reply.calls and iterations == limit:
                return "turns"
            answers = yield from (self._results(reply) if reply.calls else self._response(_text_of(turn, reply)))
            if answers is None or (yield from self._is_done()):
                self._said.messages += answers or []
                return "done"
            if iterations == limit:
                return "turns"
            if self._is_huge(answers):  # tokenizing a text of megabytes would take minutes
                return "length"
            bridge = self._bridge(reply, answers)
            if not is_closed:  # a stop string ended it
                bridge = (closing, *bridge)
            if self._room() <= len(bridge):
                return "length"
            self._said.messages += answers
            self._stream.give(bridge)
            iterations += 1

    @property
    def _responds(self) -> bool:
        return self._world is not None and self._world.respond is not None

    def _bridge(self, reply: Reply, answers: Sequence[Message]) -> tuple[int, ...]:
        try:
            return self._kit.dialect.bridge(reply, answers, self._template_kwargs)
        except ValueError as error:
            raise EpisodeError(f"what the environment says cannot be written: {error}") from error

    def _request(self) -> Request:
        number = self._said.turns
        seed = None if self._kit.is_greedy else self._seed
        if seed is not None:
            seed = seed + self._place if number == 0 else self._code.seed_of(f"turn {number}")
        room, longest = self._room(), self._kit.rollout.max_turn_length
        return Request(
            prompt_token_ids=self._stream.all,
            max_tokens=room if longest is None else min(room, longest),
            seed=seed,
            group=self._group,
            may_continue=True,
            use_adapter=self._use_adapter,
        )

    def _room(self) -> int:
        """Tokens that there is room for in the completion and in the model's context."""
        in_context = self._kit.rollout.max_model_length - len(self._stream.prompt) - len(self._stream.token_ids)
        return min(self._kit.max_completion_length - len(self._stream.token_ids), in_context)

    def _is_huge(self, answers: Sequence[Message]) -> bool:
        """Whether there is no room for them, however long their tokens are."""
        texts = (content_text(message.get("content")) for message in answers)
        return sum(map(len, texts)) > self._room() * self._kit.longest_token

    def _results(self, reply: Reply) -> Generator[Future[Any], Any, list[Message]]:
        """Make all calls of a turn; the messages with their results, in the order of the calls."""
        of_world = {tool.name for tool in self._tools} - {tool.name for tool in self._kit.tools}
        records = yield from self._code.results(reply.calls, self._tools, of_world=of_world)
        self._said.calls += records
        return reply.results([record.result for record in records])

    def _response(self, text: str) -> Generator[Future[Any], Any, list[Message] | None]:
        """What the environment says to a turn without calls; None ends the episode."""
        world = self._world
        assert world is not None and world.respond is not None
        said = yield from self._ask("respond", world.respond, world.respond_arguments(text))
        observation = self._checked(said, "respond")
        return [{"role": "user", "content": observation}] if isinstance(observation, str) else observation

    def _is_done(self) -> Generator[Future[Any], Any, bool]:
        world = self._world
        if world is None:
            return False
        return (yield from self._ask("done", world.is_done, {}, inline=True))

    def _rewards(self) -> Generator[Future[Any], Any, Mapping[str, float | None]]:
        world = self._world
        if world is None or world.get_reward is None:
            return {}
        value = yield from self._ask("get_reward", world.get_reward, {})
        try:
            return rewards_of(value, world.class_name)
        except ValueError as error:
            raise EpisodeError(str(error)) from error

    def _ask(
        self,
        member: str,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        seed: int | None = None,
        inline: bool = False,
    ) -> Generator[Future[Any], Any, Any]:
        """What a member of the environment returns; see `UserCode.ask`."""
        assert self._world is not None
        return self._code.ask(f"{self._world.class_name}.{member}", function, arguments, seed=seed, inline=inline)

    def _checked(self, said: object, what: str) -> str | list[Message] | None:
        assert self._world is not None
        try:
            return observation_of(said, f"{self._world.class_name}.{what}")
        except ValueError as error:
            raise EpisodeError(str(error)) from error

    # -------------------------------------------------------------------------------------------------------- ending

    def _played(self, finish_reason: FinishReason, rewards: Mapping[str, float | None]) -> Played:
        stream = self._stream
        completion = Completion(
            token_ids=tuple(stream.token_ids),
            logprobs=tuple(stream.logprobs),
            text=self._text(),
            finish_reason=finish_reason,
            policy_version=self._policy_version,
            given=tuple(stream.given),
            episode=self._episode(rewards=rewards),
            routed_experts=stream.routed_experts,
        )
        return self._as_played(completion)

    def _text(self) -> str:
        """Of a single turn, what the engine says; of several, all tokens decoded."""
        if self._said.turns > 1:
            return self._kit.texts.decode(self._stream.token_ids)
        return self._turn_text

    def _void(self, error: EpisodeError) -> Played:
        cause = error.__cause__
        details = "" if cause is None else "\n\n" + "".join(traceback.format_exception(cause))
        completion = Completion(
            token_ids=(),
            logprobs=(),
            text="",
            finish_reason="failed",
            policy_version=self._policy_version,
            episode=self._episode(failure=f"{error}{details}"),
        )
        return self._as_played(completion)

    def _episode(self, *, rewards: Mapping[str, float | None] | None = None, failure: str | None = None) -> Episode:
        said = self._said
        return Episode(
            messages=tuple(said.messages),
            turns=said.turns,
            calls=tuple(said.calls),
            seconds_waiting=self._code.seconds_waiting,
            rewards=rewards or {},
            recomputed_tokens=self._stream.recomputed,
            failure=failure,
        )

    def _as_played(self, completion: Completion) -> Played:
        return Played(
            completion=completion,
            prompt_token_ids=self._stream.prompt,
            content=self._content,
            world=self._world,
            is_reusable=not self._code.has_failed,
        )


def _text_of(turn: Turn, reply: Reply) -> str:
    """What an environment is told of a turn: without the stop string that ended it, and without thinking that a parser took
    out."""
    if not turn.ended_by_token and "reasoning_content" not in reply.message:
        return turn.text
    return str(reply.message.get("content") or "")
