"""Text worlds as environments: one of the tests' own, and those of TextArena and gymnasium where they are installed."""

from __future__ import annotations

import importlib.util
import random
import re
import string
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from rankup.grpo.episodes.text_worlds import (
    GymnasiumEnvironment,
    TextArenaEnvironment,
    gymnasium_factory,
    textarena_factory,
)


class Corridor:
    """A gymnasium-like world: five rooms in a row, gold in the last, and eight steps. The seed says where it begins."""

    is_closed = False

    def reset(self, *, seed: int | None = None) -> tuple[str, Mapping[str, object]]:
        self.room, self.steps = random.Random(seed).randint(0, 3), 0
        return f"room {self.room}", {}

    def step(self, action: str, /) -> tuple[str, float, bool, bool, Mapping[str, object]]:
        self.steps += 1
        self.room = max(self.room + {"right": 1, "left": -1}.get(action, 0), 0)
        has_gold = self.room == 4
        return f"room {self.room}", 1.0 if has_gold else -0.25, has_gold, self.steps == 8, {}

    def close(self) -> None:
        self.is_closed = True


def test_a_world_with_gymnasiums_methods_is_played_to_its_end():
    environment = GymnasiumEnvironment(Corridor())
    assert environment.reset(seed=3, prompt="ignored") == "room 1"
    assert environment.get_reward() is None
    assert environment.respond("dance") == "room 1"
    assert [environment.respond("right") for _ in range(2)] == ["room 2", "room 3"]
    assert not environment.done
    assert environment.respond("right") == "room 4"
    assert environment.done
    assert environment.get_reward() == 0.25


def test_a_truncated_world_has_ended_too():
    environment = GymnasiumEnvironment(Corridor())
    environment.reset(seed=0)
    for _ in range(8):
        environment.respond("wait")
    assert environment.done
    assert environment.get_reward() == -2.0


def test_check_20_a_world_begins_again_without_the_last_episode():
    environment = GymnasiumEnvironment(Corridor())
    first = environment.reset(seed=3)
    for _ in range(8):
        environment.respond("right")
    assert environment.reset(seed=3) == first
    assert not environment.done
    assert environment.get_reward() is None


def test_closing_closes_the_world():
    world = Corridor()
    GymnasiumEnvironment(world).close()
    assert world.is_closed


def test_an_observation_that_is_no_text_is_an_error_that_names_the_world():
    class Numbers(Corridor):
        def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, object]]:
            return np.zeros(3), {}

    with pytest.raises(TypeError, match="Numbers: the observation is a ndarray, not a text"):
        GymnasiumEnvironment(Numbers()).reset()


@pytest.mark.parametrize(("package", "factory"), [("textarena", textarena_factory), ("gymnasium", gymnasium_factory)])
def test_a_missing_package_is_an_error_with_the_command(package: str, factory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"{package}:Any-v0 needs the package {package}: pip install rankup\[{package}\]"):
        factory("Any-v0")


needs_textarena = pytest.mark.skipif(importlib.util.find_spec("textarena") is None, reason="textarena is not installed")
needs_gymnasium = pytest.mark.skipif(importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed")


def play_guesses(environment: TextArenaEnvironment, seed: int) -> list[str]:
    """Bisect; returns the answers."""
    low, high, answers = 1, 20, []
    assert "between 1 and 20" in environment.reset(seed=seed)
    while not environment.done:
        guess = (low + high) // 2
        answers.append(environment.respond(f"[{guess}]"))
        low, high = (guess + 1, high) if "higher" in answers[-1] else (low, guess - 1)
    return answers


@needs_textarena
def test_a_game_of_textarena_is_played_to_its_end():
    environment = textarena_factory("GuessTheNumber-v0")()
    answers = play_guesses(environment, seed=1)
    assert re.fullmatch(r"The target number is (higher|lower)\.", answers[0])  # new messages only, without our own
    assert "Congratulations" in answers[-1]
    assert environment.get_reward() == 1.0


@needs_textarena
def test_check_14_and_20_the_seed_alone_determines_a_game_of_textarena():
    make = textarena_factory("GuessTheNumber-v0")
    environment = make()
    first = play_guesses(environment, seed=3)
    assert environment.get_reward() == 1.0
    other = [play_guesses(environment, seed=seed) for seed in range(5)]
    assert any(answers != first for answers in other)
    assert play_guesses(environment, seed=3) == play_guesses(make(), seed=3) == first


@needs_textarena
def test_a_game_that_draws_numbers_at_each_step_repeats_and_leaves_the_global_random_states():
    """Two games side by side, each with its own random state."""
    make = textarena_factory("2048-v0")
    random_state, numpy_state = random.getstate(), repr(np.random.get_state())
    alone, beside, other = make(), make(), make()
    moves = ["[down]", "[left]", "[right]", "[up]"] * 5
    first = [alone.reset(seed=5), *[alone.respond(move) for move in moves]]
    second = [beside.reset(seed=5)]
    different = [other.reset(seed=6)]
    for move in moves:
        different.append(other.respond(move))
        second.append(beside.respond(move))
    assert first == second != different
    assert random.getstate() == random_state
    assert repr(np.random.get_state()) == numpy_state


@needs_textarena
def test_an_unfinished_game_and_invalid_moves():
    environment = textarena_factory("GuessTheNumber-v0")()
    environment.reset(seed=1)
    assert "invalid move" in environment.respond("I do not know")
    assert not environment.done
    assert environment.get_reward() is None
    assert "Invalid" in environment.respond("")  # the second one ends it
    assert environment.done
    assert environment.get_reward() == 0.0


@needs_textarena
def test_games_that_do_not_exist_or_are_for_several_players_are_refused():
    with pytest.raises(ValueError, match=r"textarena:Nothing-v0: .*not found"):
        textarena_factory("Nothing-v0")
    with pytest.raises(ValueError, match="textarena:TicTacToe-v0 is not a game for one player"):
        textarena_factory("TicTacToe-v0")


@needs_gymnasium
def test_a_registered_world_of_gymnasium_is_played():
    import gymnasium  # pyright: ignore[reportMissingImports]

    class Registered(Corridor, gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Text(100, charset=string.printable)

        def reset(self, *, seed: int | None = None, options: object = None) -> tuple[str, Mapping[str, object]]:
            return super().reset(seed=seed)

    gymnasium.register("Corridor-v0", Registered)
    environment = gymnasium_factory("Corridor-v0")()
    assert environment.reset(seed=3) == "room 1"
    assert [environment.respond("right") for _ in range(3)] == ["room 2", "room 3", "room 4"]
    assert environment.done
    assert environment.get_reward() == 0.5
    environment.close()


@needs_gymnasium
def test_worlds_that_do_not_exist_or_are_not_of_text_are_refused():
    with pytest.raises(ValueError, match="gymnasium:Nothing-v0: "):
        gymnasium_factory("Nothing-v0")
    with pytest.raises(ValueError, match=r"gymnasium:CartPole-v1: .*ndarray, not a text"):
        gymnasium_factory("CartPole-v1")
    with pytest.raises(ValueError, match="gymnasium:no_such_package:Any-v0: "):
        gymnasium_factory("no_such_package:Any-v0")
