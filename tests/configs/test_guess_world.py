import random
from collections.abc import Callable

import pytest

from rankup.configs.guess import EXAMPLES, LARGEST, TRIES, Guess, evaluation, train


def play(guesses: Callable[[list[tuple[int, str]]], int], number: int) -> float:
    """A game of a strategy, which sees its guesses and their answers."""
    game, said = Guess(), []
    game.reset(seed=0, number=number)
    while not game.done:
        guess = guesses(said)
        said.append((guess, game.respond(f"I say {guess}")))
    return game.get_reward()


def halves(said: list[tuple[int, str]]) -> int:
    low = max([guess + 1 for guess, answer in said if answer == "higher"], default=1)
    high = min([guess - 1 for guess, answer in said if answer == "lower"], default=LARGEST)
    return (low + high) // 2


def test_halving_finds_every_number() -> None:
    assert [play(halves, number) for number in range(1, LARGEST + 1)] == [1.0] * LARGEST


def test_distinct_random_guesses_find_five_of_sixteen() -> None:
    draw = random.Random(0)
    found = []
    for _ in range(2000):
        order = draw.sample(range(1, LARGEST + 1), TRIES)
        found.append(play(lambda said, order=order: order[len(said)], draw.randint(1, LARGEST)))
    assert sum(found) / len(found) == pytest.approx(TRIES / LARGEST, abs=0.03)


def test_a_game_ends_after_the_last_try_or_when_the_number_is_found() -> None:
    game = Guess()
    game.reset(seed=3)
    number = game.number
    assert game.respond("no idea") == "Write a number." and game.tries == 1
    game.respond(str(number))
    assert game.done and game.get_reward() == 1.0
    game.reset(seed=3)
    assert game.number == number and not game.done and game.get_reward() == 0.0


def test_a_row_may_name_its_number_and_evaluation_has_each_once() -> None:
    assert sorted(row["number"] for row in evaluation()) == list(range(1, LARGEST + 1))
    assert all(row["number"] is None for row in train())
    numbers = set()
    for seed in range(200):
        game = Guess()
        game.reset(seed=seed)
        numbers.add(game.number)
    assert numbers == set(range(1, LARGEST + 1))


def test_the_games_of_the_prompt_are_played_by_the_rules() -> None:
    for game in EXAMPLES:
        number = int(game[-1])
        for guess, answer in zip(game[:-1:2], game[1::2], strict=True):
            assert answer == ("higher" if int(guess) < number else "lower")
