"""A world to act in: a number from 1 to 16 is to be guessed in five tries, with "higher" or "lower" after each.

    data:
      train: rankup.configs.guess:train
      eval: rankup.configs.guess:evaluation
    rollout:
      environment: rankup.configs.guess:Guess

The environment answers each turn of the model (`respond`) and says when the game is over (`done`). All completions of a prompt
have the same number. Five guesses that differ find it in 0.31 of the games, halving the range finds it always.
"""

import random
import re

LARGEST, TRIES = 16, 5
FIRST = f"I think of a number from 1 to {LARGEST}. Find it in {TRIES} tries."
NEXT = f"Right! I think of another number from 1 to {LARGEST}. Find it in {TRIES} tries."
EXAMPLES = ((8, "higher", 12, "lower", 10), (8, "lower", 4, "higher", 6, "higher", 7))
"""Two games that are shown in the prompt: without them the model writes sentences."""


class Guess:
    """One game. The row may name its number, as in evaluation; else it is drawn."""

    def reset(self, seed: int, number: int | None = None) -> None:
        self.number = random.Random(seed).randint(1, LARGEST) if number is None else number
        self.tries, self.is_found = 0, False

    @property
    def done(self) -> bool:
        return self.is_found or self.tries == TRIES

    def respond(self, text: str) -> str:
        self.tries += 1
        written = re.search(r"\d+", text)
        if written is None:
            return "Write a number."
        guess = int(written.group())
        self.is_found = guess == self.number
        return "higher" if guess < self.number else "lower"

    def get_reward(self) -> float:
        return float(self.is_found)


def train() -> list[dict]:
    """Rows of the same prompt: what differs is the number, which the environment draws."""
    return [{"prompt": _prompt(), "number": None} for _ in range(256)]


def evaluation() -> list[dict]:
    """Each number once."""
    return [{"prompt": _prompt(), "number": number} for number in range(1, LARGEST + 1)]


def _prompt() -> list[dict]:
    """Two games, and the beginning of the next one."""
    messages = [{"role": "user", "content": FIRST}]
    for game in EXAMPLES:
        for place, said in enumerate(game):
            messages.append({"role": "user" if place % 2 else "assistant", "content": str(said)})
        messages.append({"role": "user", "content": NEXT})
    return messages
