"""Environments: one instance of a user's class for each episode that is open, reset before each use.

    class Guess:
        def reset(self, seed: int, **row):          # begins an episode; the same seed for all completions of a prompt
            self.number, self.done = random.Random(seed).randint(1, 16), False
            return "Guess a number from 1 to 16."

        def respond(self, text: str):               # the answer to a turn without a tool call; None ends the episode
            self.done = text == str(self.number)
            return "higher" if text < str(self.number) else "lower"

        def get_reward(self):
            return float(self.done)

    environments = Environments(Guess, caller)
    world = environments.acquire(None)
    outcome = caller.call(world.reset, world.reset_arguments(row, seed), seed=seed).result()
    ...
    environments.release(world, reuse=True)

Public methods are tools (`worlds.py`). Several environments are a mapping of names to classes, or to functions that return an
instance; then a row's column `environment` names one. An instance is made when all others are in use: connections belong into
`reset`, which may be async and has a time limit. What fails is closed and not used again. With `rollout.tool_workers` the calls
of an instance come from several threads, one at a time.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol, runtime_checkable

from ...rewards.contract import is_async
from ...rewards.loading import load_object
from ...rewards.own_code import code_of
from ..config.paths import ENVIRONMENT_PREFIXES
from .calls import Caller, Outcome, reason_of
from .tools import Tool, ToolSpec, make_tools
from .worlds import COLUMN, World

logger = logging.getLogger(__name__)

EnvironmentFactory = Callable[[], object]
"""A class, or a function that returns an instance."""

@runtime_checkable
class LimitedFactory(Protocol):
    """A factory of instances that a server may not admit in any number."""

    def __call__(self) -> object:
        ...

    def capacity(self, needed: int) -> int | None:
        """How many of `needed` instances can be open at the same time; None: all of them."""
        ...


EnvironmentFactories = EnvironmentFactory | Mapping[str, EnvironmentFactory]
"""One environment, or several by name."""


class Environments:
    """The instances of a run. One of each environment is made at once, to find mistakes at the start.

    Raises:
        ValueError: a factory failed or returned no environment.
    """

    def __init__(self, factories: EnvironmentFactories, caller: Caller) -> None:
        self._caller = caller
        self._factories: dict[str | None, EnvironmentFactory] = _by_name(factories)
        if not self._factories:
            raise ValueError("rollout.environment: an empty mapping names no environment")
        self._is_mapping = isinstance(factories, Mapping)
        self._idle: dict[str | None, list[World]] = {name: [] for name in self._factories}
        self._open: list[World] = []
        self._probes: dict[str | None, World] = {}
        for name in self._factories:
            self._probes[name] = self._make(name, seed=None)
            self._idle[name].append(self._probes[name])

    @property
    def names(self) -> tuple[str, ...]:
        """Of several environments; () for a single one."""
        return tuple(name for name in self._factories if name is not None)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of the classes that have `get_reward`, under which its numbers are logged; see `worlds.rewards_of`."""
        return tuple(dict.fromkeys(world.class_name for world in self._probes.values() if world.get_reward is not None))

    @property
    def responds(self) -> bool:
        """Whether one of them answers turns without a call."""
        return any(world.respond is not None for world in self._probes.values())

    @property
    def is_async(self) -> bool:
        """Whether a member or a tool of one of them is."""
        worlds = self._probes.values()
        members = [one for world in worlds for one in (world.reset, world.respond, world.get_reward) if one is not None]
        return any(map(is_async, members)) or any(tool.is_async for world in worlds for tool in world.methods)

    @property
    def has_own_tools(self) -> bool:
        """Whether one of them has `tools`, which are known at run time only."""
        return any(inspect.getattr_static(world.instance, "tools", None) is not None for world in self._probes.values())

    def capacity(self, needed: int) -> int | None:
        """How many of `needed` instances can be open at the same time, if a server is asked that admits fewer; None: all.

        Raises:
            ValueError: a server cannot be reached.
        """
        try:
            found = [factory.capacity(needed) for factory in self._factories.values() if isinstance(factory, LimitedFactory)]
        except ConnectionError as error:
            raise ValueError(str(error)) from error
        return min((one for one in found if one is not None), default=None)

    def tools(self, name: str | None, extra: Sequence[Tool] = ()) -> list[Tool]:
        """Tools that belong to no environment, and those of the class: its public methods.

        What is known at run time only is in `World.tools`. Raises ValueError if two have one name.
        """
        return make_tools([*extra, *self._probes[name].methods])

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        """The environment of a row; None if there is only one. Raises ValueError if its column names none."""
        if not self._is_mapping:
            return None
        name = row.get(COLUMN)
        if isinstance(name, str) and name in self._factories:
            return name
        there_are = f"the environments are {', '.join(map(repr, self.names))}"
        if name is None:
            raise ValueError(f"a row has no value in its column {COLUMN!r}, which must name its environment: {there_are}")
        raise ValueError(f"a row's column {COLUMN!r} is {name!r}: {there_are}")

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError if a row cannot begin an episode: it names no environment, or `reset` requires another column."""
        self._probes[self.name_of(row)].reset_arguments(row, seed=None)

    def acquire(self, name: str | None, *, seed: int | None = None) -> World:
        """An instance for one episode, which must `reset` it. A new one if all others are in use.

        Args:
            seed: of the global random generators, while a new instance is made.

        Raises:
            ValueError: it could not be made.
        """
        idle = self._idle[name]
        world = idle.pop() if idle else self._make(name, seed=seed)
        self._open.append(world)
        return world

    def release(self, world: World, *, reuse: bool) -> None:
        """The episode is over. Without `reuse`, after a time limit or a failure, the instance is closed and not used again.

        Does nothing if it was given back before: what fails may do so behind the release.
        """
        if world not in self._open:
            return
        self._open.remove(world)
        if reuse:
            self._idle[world.name].append(world)
        else:
            self._close(world)

    def close(self) -> None:
        """Close all instances. What a `close` raises is logged."""
        worlds = self._worlds()
        self._open.clear()
        self._idle = {name: [] for name in self._factories}
        wait([future for future in map(self._close, worlds) if future is not None])

    def _worlds(self) -> list[World]:
        return [*self._open, *(world for idle in self._idle.values() for world in idle)]

    def _make(self, name: str | None, *, seed: int | None) -> World:
        factory = self._factories[name]
        shown = _name_of_factory(factory) if name is None else f"{name!r} ({_name_of_factory(factory)})"
        if not callable(factory):
            raise ValueError(f"environment {shown}: give a class, or a function that returns an instance, not an instance")
        outcome = self._caller.call(factory, {}, seed=seed).result()
        if outcome.error is not None:
            raise ValueError(f"environment {shown} could not be made: {reason_of(outcome.error)}") from outcome.error
        if any(world.instance is outcome.value for world in self._worlds()):
            raise ValueError(f"environment {shown}: returned the same object twice; each episode needs an instance of its own")
        look = functools.partial(World.of, outcome.value, name, shown, like=self._probes.get(name))
        outcome = self._caller.call(look, {}, seed=seed, inline=True).result()
        if isinstance(outcome.error, ValueError):
            raise outcome.error
        if outcome.error is not None:
            raise ValueError(f"environment {shown}: its members cannot be read: {reason_of(outcome.error)}") from outcome.error
        return outcome.value

    def _close(self, world: World) -> Future[Outcome] | None:
        """Begin to close an instance. None: it has no `close`."""
        if world.close is None:
            return None
        is_logged: Future[Outcome] = Future()

        def log(done: Future[Outcome]) -> None:
            error = done.result().error
            if error is not None:
                logger.warning("environment %s: close failed: %s", world.class_name, reason_of(error))
            is_logged.set_result(done.result())

        self._caller.call(world.close, {}).add_done_callback(log)
        return is_logged


def load_environments(spec: str | Mapping[str, str] | None) -> EnvironmentFactories | None:
    """The factories of `rollout.environment`.

    Args:
        spec: `file.py:Class`, `package.module:Class`, also of a function that returns an instance, `openenv:http://host:port`,
            `textarena:Game-v0`, `gymnasium:Name-v1`; or several of them by name.

    Raises:
        ValueError: it cannot be loaded.
        FileNotFoundError: no such file.
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        return _load(spec, "rollout.environment")
    return {name: _load(one, f"rollout.environment.{name}") for name, one in spec.items()}


def code_of_episodes(
    tools: Iterable[ToolSpec | str], environments: EnvironmentFactories | str | Mapping[str, str] | None
) -> dict[str, str]:
    """Hashes of the code of tools and environments in a user's own files, for a resumed run to compare; see `code_of`."""
    several = environments.values() if isinstance(environments, Mapping) else [environments]
    functions = [one.function if isinstance(one, Tool) else one[-1] if isinstance(one, tuple | list) else one for one in tools]
    own = [
        one
        for one in [*functions, *several]
        if one is not None and not (isinstance(one, str) and one.startswith(ENVIRONMENT_PREFIXES))
    ]
    return {name: digest for one in own for name, digest in code_of(one).items()}


def _load(spec: str, option: str) -> EnvironmentFactory:
    if spec.startswith(ENVIRONMENT_PREFIXES):
        kind, _, name = spec.partition(":")
        if not name:
            raise ValueError(f"{option}: {spec!r} needs a name or an address behind the colon")
        return _of_library(kind, name)
    try:
        found = load_object(spec)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if not callable(found):
        raise ValueError(f"{option}: {spec} is not a class, nor a function that returns an instance")
    return found


def _of_library(kind: str, name: str) -> EnvironmentFactory:
    if kind == "openenv":
        from .openenv import openenv_factory

        return openenv_factory(name)
    from .text_worlds import gymnasium_factory, textarena_factory

    return textarena_factory(name) if kind == "textarena" else gymnasium_factory(name)


def _by_name(factories: EnvironmentFactories) -> dict[str | None, EnvironmentFactory]:
    return {**factories} if isinstance(factories, Mapping) else {None: factories}


def _name_of_factory(factory: object) -> str:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__name__", type(factory).__name__)
