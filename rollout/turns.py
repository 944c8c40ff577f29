"""The loop of turns: many episodes at once, each of which asks for a turn, or waits for its tools, until it ends.

    def episode() -> Play[str]:
        turn = yield Request(prompt_token_ids=(1, 2, 3), max_tokens=16, seed=7)     # sampled beside other episodes
        result = yield executor.submit(tool, turn.text)                             # waits, while others are sampled
        return result

    with engine.requests(config.rollout) as requests:
        for index, outcome in play(requests, [episode(), episode()]):               # in the order in which they end
            ...

An episode is a generator, so it reads from top to bottom. It gets back the turn, or the result of the future. The loop
submits a request as soon as its episode asks for it: no episode waits for a longer one. Episodes are advanced in their order
between two steps of the engine, so that what they call in this process happens in an order that repeats.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

if TYPE_CHECKING:
    import numpy as np

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample: a turn of an episode.

    Attributes:
        prompt_token_ids: all tokens before the turn, sampled or given.
        max_tokens: most tokens of the turn.
        seed: None: sampling is not reproducible.
        group: adjacent requests of one group with the same prompt may be computed together.
        may_continue: the engine may keep what it computed for the next turn of the same key, until that is released.
        use_adapter: False samples from the base model, beside requests that sample from the policy.
        streams: `Requests.sampled` tells the tokens of this request while it is sampled.
    """

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int | None
    group: int = 0
    may_continue: bool = False
    use_adapter: bool = True
    streams: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was sampled for a request. The attributes are those of `Completion`.

    `ended_by_token`: its last token ended it, not a stop string. `cached_tokens`: tokens of its prompt whose keys and values
    the engine still had. `routed_experts`: the prompt of the request is all that stands before the turn.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    ended_by_token: bool
    policy_version: int
    cached_tokens: int
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)


class Requests(Protocol):
    """An engine's requests while episodes are played. Leaving its context aborts those that are not finished."""

    def __enter__(self) -> Self:
        ...

    def __exit__(self, *error: object) -> None:
        ...

    @property
    def has_unfinished(self) -> bool:
        """Whether a request was submitted and has not ended."""
        ...

    def submit(self, key: int, request: Request) -> None:
        """Sample this request from the next step on, beside others.

        Raises:
            ValueError: the engine cannot sample like this.
        """
        ...

    def release(self, key: int) -> None:
        """The episode of this key asks for no further turn."""
        ...

    def step(self) -> list[tuple[int, Turn]]:
        """Sample one more token of the running requests; returns those that have ended, with their keys.

        Raises:
            EngineError: the engine failed.
        """
        ...

    def sampled(self, key: int) -> tuple[int, ...]:
        """The tokens so far of a running request that was submitted with `streams`."""
        ...


Play = Generator[Request | Future[Any], Any, ResultT]
"""An episode in progress: yields what it needs next, gets it sent, and returns its outcome. Its futures do not fail."""


def play(requests: Requests, episodes: Sequence[Play[ResultT]], *, at_most: int | None = None) -> Iterator[tuple[int, ResultT]]:
    """Play all episodes; yields the index and the outcome of each when it ends.

    If the caller stops early, or an error is raised, the other episodes are closed.

    Args:
        at_most: episodes that are open at the same time; None: all.
    """
    waiting: dict[Future[Any], int] = {}
    begun = 0
    open_now: set[int] = set()
    try:
        while begun < len(episodes) or open_now:
            room = len(episodes) if at_most is None else at_most - len(open_now)
            new = range(begun, min(len(episodes), begun + room))
            begun = new.stop
            open_now.update(new)
            ready: list[tuple[int, Any]] = [(index, None) for index in new]
            if not ready and requests.has_unfinished:
                ready += requests.step()
            if waiting:
                ready += _finished(waiting, is_idle=not ready and not requests.has_unfinished)
            for index, value in sorted(ready, key=lambda one: one[0]):
                outcome = _advance(requests, waiting, index, episodes[index], value)
                if outcome is not None:
                    open_now.discard(index)
                    requests.release(index)
                    yield index, outcome[0]
    finally:
        for episode in episodes:
            episode.close()


def _advance(
    requests: Requests, waiting: dict[Future[Any], int], index: int, episode: Play[ResultT], value: Any
) -> tuple[ResultT] | None:
    """Send the episode what it waits for, until it asks for what is not there yet; its outcome if it ends."""
    try:
        needed = episode.send(value)
        while isinstance(needed, Future) and needed.done():
            needed = episode.send(needed.result())
    except StopIteration as end:
        return (end.value,)
    if isinstance(needed, Future):
        waiting[needed] = index
    else:
        requests.submit(index, needed)
    return None


def _finished(waiting: dict[Future[Any], int], *, is_idle: bool) -> list[tuple[int, Any]]:
    """Remove the finished futures; returns their episodes and results. If the engine has nothing to do, waits for one."""
    if is_idle:
        wait(waiting, return_when=FIRST_COMPLETED)
    done = [future for future in waiting if future.done()]
    return [(waiting.pop(future), future.result()) for future in done]
