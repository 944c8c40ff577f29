"""Shared by the modules of this folder: the text of a completion, and values, errors and names in messages.

    text_of("42")                                         # "42"
    text_of([{"role": "assistant", "content": "42"}])     # "42", of the assistant's last message
    content_text([{"type": "text", "text": "42"}])        # "42"
    with_prefixes(["a</think>b"], ["<think>"], bool)      # ["<think>a</think>b"]
    shorten("x" * 99, 10)                                 # "xxxxxxx..."
    describe(KeyError("gold"))                            # "KeyError: 'gold'"
    did_you_mean("lenght", ["length", "tags"])            # "did you mean length?"
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_TEXT_PARTS = ("text", "input_text", "output_text")

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: a list of messages."""

Function = Callable[..., Any]
"""A reward function: called with keyword arguments only, it returns one number for each completion, or None where it does not
apply."""


def text_of(completion: Completion) -> str:
    """The text itself, or the content of the assistant's last message: "" if there is none, or it has no text (a tool call).

    What a tool or a user says behind it is no answer of the model.
    """
    if isinstance(completion, str):
        return completion
    answers = [message for message in completion if message.get("role", "assistant") == "assistant"]
    return content_text(answers[-1].get("content")) if answers else ""


def content_text(content: str | Sequence[Any] | None) -> str:
    """A message's content as one text: parts are joined as they are, those that are no text are left out; None is ""."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(text for text in content_parts(content) if text is not None)


def content_parts(content: Sequence[Any]) -> list[str | None]:
    """The text of each part of a message's content: `{"type": "text", "text": ...}`, or a text; None for any other part."""

    def text_of_part(part: Any) -> str | None:
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping) or part.get("type", "text") not in _TEXT_PARTS:
            return None
        text = part.get("text")
        return text if isinstance(text, str) else None

    return [text_of_part(part) for part in content]


def with_prefixes(
    completions: Sequence[Completion], prefixes: Sequence[str] | None, is_used: Callable[[str], bool]
) -> list[str]:
    """The texts of completions, each after what its prompt has written of it (`completion_prefixes`).

    is_used: called with the tag that a prefix begins with, such as `<think>`; otherwise the prefix is left out.
    """
    texts = [text_of(completion) for completion in completions]
    if prefixes is None:
        return texts
    return [
        prefix + text if prefix and is_used(prefix[: prefix.index(">") + 1]) else text
        for prefix, text in zip(prefixes, texts, strict=True)
    ]


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
