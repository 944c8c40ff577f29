"""The calls of one episode: of tools, and of the members of its environment.

    code = UserCode(caller, seed=group_seed, place=g)
    text = yield from code.ask(f"{world.class_name}.respond", world.respond, {"text": text})   # EpisodeError: it failed
    records = yield from code.results(reply.calls, tools, of_world=names)                     # errors are results, too
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from ...rewards.contract import copied
from ...rollout.types import CallError, ToolCallRecord
from .calls import SEED_BITS, Caller, Outcome, error_text
from .dialect import ParsedCall
from .kit import EpisodeError
from .tools import Tool, unknown_tool


class UserCode:
    """See the module's docstring.

    Args:
        seed: of the group; None: nothing is reproducible. `place`: of the completion in it.

    Attributes:
        has_failed: whether a call has timed out, or a member of the environment failed: it is not used again.
        seconds_waiting: from calls to their results.
    """

    def __init__(self, caller: Caller, *, seed: int | None, place: int) -> None:
        self.has_failed = False
        self.seconds_waiting = 0.0
        self._caller = caller
        self._seed, self._place = seed, place
        self._count = 0

    def seed_of(self, what: str) -> int | None:
        """A seed of its own for a turn or a call of this episode."""
        if self._seed is None:
            return None
        digest = hashlib.blake2b(f"{self._seed}/{self._place}/{what}".encode(), digest_size=SEED_BITS // 8).digest()
        return int.from_bytes(digest, "little")

    def seed_of_draws(self, what: str) -> int:
        """A seed for the global random generators while a call runs. If nothing is reproducible, another one each time."""
        seed = self.seed_of(what)
        return secrets.randbits(SEED_BITS) if seed is None else seed

    def ask(
        self,
        what: str,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        seed: int | None = None,
        inline: bool = False,
    ) -> Generator[Future[Any], Any, Any]:
        """What a member of the environment returns.

        Args:
            seed: of the global random generators; None: one of this call's own.
            inline: it is quick, and waits for no thread.

        Raises:
            EpisodeError: it raised, or took too long.
        """
        outcome: Outcome = yield self._call(function, arguments, seed=seed, inline=inline)
        self.seconds_waiting += outcome.seconds
        if outcome.error is not None:
            self.has_failed = True
            raise EpisodeError(f"{what} {outcome.error if outcome.timed_out else 'failed'}") from outcome.error
        return outcome.value

    def results(
        self, calls: Sequence[ParsedCall], tools: Sequence[Tool], *, of_world: Collection[str]
    ) -> Generator[Future[Any], Any, list[ToolCallRecord]]:
        """Make all calls of a turn; what became of them, in their order. Those that run beside run at the same time, but
        those of the environment one after the other: an instance is used by one call at a time.

        Args:
            of_world: names of tools that are methods of the environment.

        Raises:
            EpisodeError: the connection to the environment was lost.
        """
        started = yield from self._all_started(calls, tools, of_world)
        records: list[ToolCallRecord] = []
        for call, begun in zip(calls, started, strict=True):
            if isinstance(begun, ToolCallRecord):
                records.append(begun)
                continue
            outcome: Outcome = yield begun
            if isinstance(outcome.error, ConnectionError) and call.name in of_world:
                self.has_failed = True
                raise EpisodeError(f"{call.name}: the connection to the environment was lost") from outcome.error
            text, is_result = outcome.told()
            error: CallError | None = "timeout" if outcome.timed_out else None if is_result else "raised"
            self.has_failed |= outcome.timed_out
            records.append(record_of(call, text, error, seconds=outcome.seconds))
        self.seconds_waiting += max(record.seconds for record in records)
        return records

    def _all_started(
        self, calls: Sequence[ParsedCall], tools: Sequence[Tool], of_world: Collection[str]
    ) -> Generator[Future[Any], Any, list[Future[Outcome] | ToolCallRecord]]:
        """All calls in progress, once all of the environment's but its last one have ended."""
        started: list[Future[Outcome] | ToolCallRecord] = []
        in_world: Future[Outcome] | None = None
        for call in calls:
            is_of_world = call.name in of_world
            if is_of_world and in_world is not None:
                yield in_world
            begun = self._started(call, tools)
            if is_of_world and isinstance(begun, Future):
                in_world = begun
            started.append(begun)
        return started

    def _started(self, call: ParsedCall, tools: Sequence[Tool]) -> Future[Outcome] | ToolCallRecord:
        """The call in progress, or why it cannot be made."""
        if call.error is not None:
            return malformed(call)
        tool = next((one for one in tools if one.name == call.name), None)
        if tool is None:
            return record_of(call, error_text(unknown_tool(call.name, tools)), "unknown")
        if problem := tool.problem(call.arguments):
            return record_of(call, error_text(problem), "arguments")
        assert isinstance(call.arguments, Mapping)
        return self._call(tool.function, copied(call.arguments))  # the tool may change them

    def _call(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        seed: int | None = None,
        inline: bool = False,
    ) -> Future[Outcome]:
        self._count += 1
        own_seed = self.seed_of_draws(f"call {self._count}") if seed is None else seed
        return self._caller.call(function, arguments, seed=own_seed, inline=inline)


def malformed(call: ParsedCall) -> ToolCallRecord:
    """The record of a call that cannot be parsed."""
    return record_of(call, error_text(call.error or ""), "malformed")


def record_of(call: ParsedCall, result: str, error: CallError | None, *, seconds: float = 0.0) -> ToolCallRecord:
    """The record of a call."""
    return ToolCallRecord(name=call.name, arguments=call.arguments, result=result, seconds=seconds, error=error)
