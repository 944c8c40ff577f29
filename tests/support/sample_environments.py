"""Environments for tests, and what calls them."""

import functools
import random
from collections.abc import Callable
from typing import Any

from rankup.grpo.episodes.calls import Caller

LONG = 20.0


def value(caller: Caller, function: Callable[..., Any], arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    outcome = caller.call(function, arguments or {}, **options).result(LONG)
    assert outcome.error is None, outcome.error
    return outcome.value


class Base:
    def inherited(self) -> str:
        """Inherited."""
        return "inherited"


class Guess(Base):
    """Has a member of every kind."""

    limit = 5

    def __init__(self) -> None:
        self.tried = 0
        self.closed = 0

    def reset(self, seed: int, low: int = 1) -> str:
        self.number, self.tried = random.Random(seed).randint(low, 16), 0
        return f"Guess a number from {low} to 16."

    def respond(self, text: str) -> str | None:
        self.tried += 1
        return None if text == "stop" else "higher"

    @property
    def done(self) -> bool:
        return self.tried >= self.limit

    @property
    def secret(self) -> int:
        raise RuntimeError("properties are not evaluated in the search for tools")

    @functools.cached_property
    def costly(self) -> int:
        raise RuntimeError("neither are these")

    def get_reward(self) -> float:
        return 1.0

    def hint(self, kind: str) -> str:
        """A hint.

        Args:
            kind: Of which kind.
        """
        return f"{kind} after {self.tried}"

    async def ask(self) -> str:
        """Ask."""
        return "asked"

    @staticmethod
    def rules() -> str:
        """The rules."""
        return "rules"

    @classmethod
    def most(cls) -> int:
        """Most tries."""
        return cls.limit

    def seed(self, value: int) -> None:
        raise AssertionError

    def _private(self) -> None:
        raise AssertionError

    class Nested:
        pass

    def close(self) -> None:
        self.closed += 1


def find(query: str) -> str:
    """Find.

    Args:
        query: What.
    """
    return query


FIND = ("find", "Find.", {"properties": {"query": {"type": "string"}}}, lambda query: query)
