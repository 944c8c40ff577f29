"""What the built-in rewards share: the text of a completion, and the type of what a factory returns.

    text_of("42")                                         # "42"
    text_of([{"role": "assistant", "content": "42"}])     # "42"
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: a list of messages."""

RewardFunction = Callable[..., list[float | None]]
"""Called with keyword arguments only; returns one number, or None where it does not apply, for each completion."""


def text_of(completion: Completion) -> str:
    """A text as it is; of a conversation the last message's content, "" where that is None or missing (a tool call)."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""
