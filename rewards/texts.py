"""Shared by the modules of this folder: the text of a completion, and values, errors and names in messages.

    text_of("42")                                         # "42"
    text_of([{"role": "assistant", "content": "42"}])     # "42"
    shorten("x" * 99, 10)                                 # "xxxxxxx..."
    describe(KeyError("gold"))                            # "KeyError: 'gold'"
    did_you_mean("lenght", ["length", "tags"])            # "did you mean length?"
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: a list of messages."""

Function = Callable[..., Any]
"""A reward function: called with keyword arguments only, it returns one number for each completion, or None where it does not
apply."""


def text_of(completion: Completion) -> str:
    """The text itself, or the content of a conversation's last message: "" where that is None or missing (a tool call)."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of a text, with "..." for the rest."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(error: BaseException) -> str:
    """Type and message of an error in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
    return f"{text} (sys.exit() was called)" if isinstance(error, SystemExit) else text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that offers the known names closest to a mistyped one; "" where none is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else ""
