"""Games of TextArena and text worlds of gymnasium, as environments that answer to turns.

    environment = textarena_factory("GuessTheNumber-v0")()
    text = environment.reset(seed=3)
    text = environment.respond("[7]")
    if environment.done:
        reward = environment.get_reward()

Neither package is a dependency: `pip install rankup[textarena]`, `pip install rankup[gymnasium]`.
"""

from __future__ import annotations

import importlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import numpy as np

_RANDOM_LOCK = threading.Lock()
"""TextArena's games draw from the global random states of Python and numpy, one game at a time."""


class TextWorld(Protocol):
    """The part of `gymnasium.Env` that is used. Observations and actions are texts."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, Any]]: ...

    def step(self, action: Any, /) -> tuple[Any, Any, bool, bool, Mapping[str, Any]]: ...

    def close(self) -> None: ...


class GymnasiumEnvironment:
    """A world with gymnasium's methods. Its reward is the sum over the steps."""

    def __init__(self, world: TextWorld) -> None:
        self.done = False
        self._world = world
        self._reward: float | None = None

    def reset(self, *, seed: int | None = None, **row: object) -> str:
        """Begin an episode; returns the first observation."""
        self.done, self._reward = False, None
        return self._text(self._world.reset(seed=seed)[0])

    def respond(self, text: str) -> str:
        """Take a step; returns the observation."""
        observation, reward, terminated, truncated, _ = self._world.step(text)
        self.done = bool(terminated or truncated)
        self._reward = (self._reward or 0.0) + float(reward)
        return self._text(observation)

    def get_reward(self) -> float | None:
        """None: no step was taken."""
        return self._reward

    def close(self) -> None:
        """Close the world."""
        self._world.close()

    def _text(self, observation: object) -> str:
        if isinstance(observation, str):
            return observation
        name, kind = type(self._world).__name__, type(observation).__name__
        raise TypeError(f"{name}: the observation is a {kind}, not a text; wrap the world in one that describes it")


class TextArenaEnvironment:
    """A game of TextArena for one player. Its reward is None until the game is over.

    The game's action wrappers apply; of observations, each turn shows the new messages only.
    """

    def __init__(self, game: Any, inner: Any) -> None:
        """`inner` is the game without its wrappers."""
        self.done = False
        self._game = game
        self._inner = inner
        self._random = _random_states(None)
        self._reward: float | None = None

    def reset(self, *, seed: int | None = None, **row: object) -> str:
        """Begin a game; returns its rules."""
        self.done, self._reward = False, None
        self._random = _random_states(seed)
        with self._own_random():
            self._game.reset(num_players=1, seed=seed)
        return self._news()

    def respond(self, text: str) -> str:
        """Make a move; returns what the game says, at its end the reason of the outcome."""
        with self._own_random():
            self.done = bool(self._game.step(action=text)[0])
        if not self.done:
            return self._news()
        rewards, info = self._inner.close()
        self._reward = None if not rewards else float(rewards[0])
        return "\n".join(part for part in (self._news(), str(info[0].get("reason") or "")) if part)

    def get_reward(self) -> float | None:
        """The game's; None: it is not over."""
        return self._reward

    def _news(self) -> str:
        """Messages since the last turn, without the player's own."""
        _, messages = self._inner.get_observation()
        return "\n".join(text for sender, text, _ in messages if sender != 0)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Let the game draw from a random state of its own, so that its seed determines the whole game."""
        with _RANDOM_LOCK:
            outer = random.getstate(), np.random.get_state()
            random.setstate(self._random[0])
            np.random.set_state(self._random[1])
            try:
                yield
            finally:
                self._random = random.getstate(), np.random.get_state()
                random.setstate(outer[0])
                np.random.set_state(outer[1])


def _random_states(seed: int | None) -> tuple[Any, Any]:
    """Those of Python and numpy. None: they differ each time."""
    return random.Random(seed).getstate(), np.random.RandomState(None if seed is None else seed % 2**32).get_state()


def textarena_factory(game: str) -> Callable[[], TextArenaEnvironment]:
    """What makes environments of a game for one player, such as `GuessTheNumber-v0`.

    Raises:
        ValueError: TextArena is not installed, or it has no such game for one player.
    """
    textarena = _package("textarena", f"textarena:{game}")

    def make() -> TextArenaEnvironment:
        inner = made = textarena.make(game)
        while isinstance(inner, textarena.Wrapper):
            inner = inner.env
        return TextArenaEnvironment(made, inner)

    try:
        make().reset(seed=0)
    except AssertionError as error:
        raise ValueError(f"textarena:{game} is not a game for one player: {error}") from error
    except ValueError as error:
        raise ValueError(f"textarena:{game}: {error}") from error
    return make


def gymnasium_factory(name: str) -> Callable[[], GymnasiumEnvironment]:
    """What makes environments of a registered world, such as `my_package:Maze-v0`. Its observations and actions are texts.

    Raises:
        ValueError: gymnasium is not installed, or there is no such world, or its observations are no texts.
    """
    gymnasium = _package("gymnasium", f"gymnasium:{name}")

    def make() -> GymnasiumEnvironment:
        return GymnasiumEnvironment(gymnasium.make(name))

    try:
        first = make()
        first.reset(seed=0)
        first.close()
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"gymnasium:{name}: {error}") from error
    return make


def _package(name: str, user: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{user} needs the package {name}: pip install rankup[{name}] ({error})") from error
