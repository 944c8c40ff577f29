"""Environments and tools of complete runs with a tiny model, whose turns are noise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

TURNS = 3


class Noisy:
    """Answers every turn with random words, from the generators of the process; the reward is random too, in part."""

    def __init__(self) -> None:
        random.seed(0)

    def reset(self, target: int, **row: Any) -> str:
        self.target, self.said = target, 0
        return f" ({random.randint(0, 9)})"

    def respond(self, text: str) -> str:
        random.seed(len(text))
        self.said += 1
        return f"{random.choice(['more', 'less', 'again'])} {random.randint(0, 99)}"

    @property
    def done(self) -> bool:
        return self.said == TURNS

    def get_reward(self) -> float:
        return self.said + random.random()


class BreaksAtStep(Noisy):
    """Fails in all episodes of rows whose target is above a limit in a file beside the run."""

    def reset(self, target: int, **row: Any) -> str:
        if target >= int(Path("limit.txt").read_text()):
            raise RuntimeError(f"no world for {target}")
        return super().reset(target)


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b
