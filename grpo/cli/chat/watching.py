"""An engine whose requests are watched while they are sampled.

    sampler = WatchedSampler(engine, watch)         # `watch` gets the tokens so far after every step, and may raise
    with sampler.requests(sampling) as requests:
        ...
    dialogues.play(sampler, prompts, sampling)      # episodes too
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Self

from ....rollout.config import SamplingConfig
from ....rollout.protocol import TurnSampler
from ....rollout.turns import Request, Requests, Turn

Tokens = tuple[int, ...]
Watch = Callable[[Mapping[int, Sequence[Tokens]]], None]
"""Gets the tokens of each request's turns so far, by its key."""


class WatchedSampler:
    """See the module's docstring. A `TurnSampler`."""

    def __init__(self, engine: TurnSampler, watch: Watch) -> None:
        self._engine, self._watch = engine, watch
        self.policy_version = engine.policy_version

    def requests(self, sampling: SamplingConfig, *, stop_token_ids: Collection[int] = ()) -> WatchedRequests:
        """See `TurnSampler`."""
        return WatchedRequests(self._engine.requests(sampling, stop_token_ids=stop_token_ids), self._watch)


class WatchedRequests:
    """`turns.Requests` of an engine, which stream."""

    def __init__(self, requests: Requests, watch: Watch) -> None:
        self._requests, self._watch = requests, watch
        self._turns: dict[int, list[Tokens]] = {}
        self._running: set[int] = set()

    def __enter__(self) -> Self:
        self._requests.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._requests.__exit__(*error)

    @property
    def has_unfinished(self) -> bool:
        """See `turns.Requests`."""
        return self._requests.has_unfinished

    def submit(self, key: int, request: Request) -> None:
        """See `turns.Requests`."""
        self._requests.submit(key, replace(request, streams=True))
        self._turns.setdefault(key, []).append(())
        self._running.add(key)

    def release(self, key: int) -> None:
        """See `turns.Requests`."""
        self._requests.release(key)

    def step(self) -> list[tuple[int, Turn]]:
        """See `turns.Requests`."""
        ended = self._requests.step()
        for key, turn in ended:
            self._running.discard(key)
            self._turns[key][-1] = turn.token_ids
        for key in self._running:
            self._turns[key][-1] = self._requests.sampled(key)
        self._watch(self._turns)
        return ended

    def sampled(self, key: int) -> Tokens:
        """See `turns.Requests`."""
        return self._requests.sampled(key)
