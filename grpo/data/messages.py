"""What a prompt is: a text, or a conversation in one of the forms in which people write them.

    read_prompt("2 + 3?")                                           # the text
    read_prompt('[{"role": "user", "content": "2 + 3?"}]')          # the conversation that the text holds
    texts_of([{"type": "text", "text": "2 + "}, "3?"])              # ["2 + ", "3?"]
    read_tools('[{"type": "function", "function": {...}}]')         # the list

A conversation is a list of messages, mappings with `role` and `content`. `read_prompt` returns it as reward functions get it:
as it was written, without fields that are None. `templates.py` brings it into the form that a chat template takes.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...rewards.texts import content_parts, shorten
from ..common.errors import first_line

Message = dict[str, Any]

NEITHER = "is neither a text nor a conversation (a list of mappings with role and content)"
_MAY_HOLD_MESSAGES = re.compile(r"""\s*(?:array\()?["']?\s*[\[{]""")
_BEGINS_LIKE_MESSAGES = re.compile(
    r"""\s*(?:array\()?["']?\s*\[\s*\{\s*  \\?["']+ (?:role (?=.*content) | content (?=.*role)) \\?["']+\s*:\s*  \\?["'\[]""",
    re.VERBOSE | re.DOTALL,
)
_NAMES_KEYS = re.compile(r"""['"](?:role|from)\\?['"]""")


class BadRowError(ValueError):
    """A row that cannot be trained on, for a reason of its own; the message goes on after "the prompt of row 5"."""


def read_prompt(value: object) -> str | list[Message]:
    """A text, or the messages of a conversation, also if the value is a text that holds one as JSON or as Python's `repr`.

    Raises:
        BadRowError: neither; a message without role or content, or with content that is not text.
    """
    if isinstance(value, str):
        messages = messages_in(value)
        return value if messages is None else messages
    return _read_messages(value.tolist() if isinstance(value, np.ndarray) else value)


def messages_in(text: str) -> list[Message] | None:
    """The conversation that a text holds as JSON or as Python's `repr`, as tables of text do; None: it is an ordinary text.

    A conversation is a list in which a mapping has a role, and content or tool calls. Other JSON is ordinary text.

    Raises:
        BadRowError: the text begins like a conversation and cannot be parsed, holds messages in another form, or a message that
            cannot be trained on.
    """
    if not _MAY_HOLD_MESSAGES.match(text):
        return None
    value = _parsed(text)
    if isinstance(value, str):  # encoded twice
        value = _parsed(value)
    if _has_messages(value):
        return _read_messages(value)
    hint = None
    if _has_messages([value]):
        hint = "one message: put it into a list"
    elif isinstance(value, Mapping) and _has_messages(value.get("messages")):
        hint = "a mapping with a conversation: write only the list"
    elif _is_sharegpt(value):
        hint = "a conversation with the keys from and value: call them role and content"
    if hint is not None:
        raise BadRowError(f"is text that holds {hint} ({shorten(repr(text), 60)})")
    return None


def _parsed(text: str) -> Any:
    """The value that a text holds as JSON or as Python's `repr`; None if it is an ordinary text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") or not _NAMES_KEYS.search(text):  # JSON with more text after it, or other text
            return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if not _BEGINS_LIKE_MESSAGES.match(text):
            return None
        raise BadRowError(
            "is text that begins like a conversation, but it is neither JSON nor Python's notation "
            f"({shorten(repr(text), 60)}): write the column as JSON (json.dumps), or the rows as JSONL"
        ) from error


def _has_messages(value: object) -> bool:
    return isinstance(value, list) and any(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and ("content" in one or "tool_calls" in one)
        for one in value
    )


def _is_sharegpt(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(one, Mapping) and {"from", "value"} <= one.keys() for one in value)
    )


def _read_messages(value: object) -> list[Message]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, Mapping) and "role" in one for one in value):
        hint = ": its keys from and value must be called role and content" if _is_sharegpt(value) else ""
        raise BadRowError(f"{NEITHER}{hint}: {shorten(repr(value), 80)}")
    return [_read_message(message, place) for place, message in enumerate(value)]


def _read_message(written: Mapping[str, Any], place: int) -> Message:
    """A message without fields that are None, which stand for absent ones in the formats of OpenAI and of Arrow.

    What a tool call's arguments hold is data, where None is a value.
    """
    message = {key: value for key, value in written.items() if value is not None or key == "content"}
    role = message.get("role")
    if not isinstance(role, str):
        raise BadRowError(f"{NEITHER}: the role of message {place} is {role!r}")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            raise BadRowError(f"has tool_calls in message {place} that are not a list of mappings: {shorten(repr(calls), 60)}")
        message["tool_calls"] = [_without_none(call) for call in calls]
    content = message.get("content")
    has_more = role == "assistant" and any(message.get(key) for key in message.keys() - {"role", "content", "name"})
    if content is None and not has_more:
        raise BadRowError(f"has no content in message {place} ({role})")
    if not isinstance(content, str | list | tuple | None):
        raise BadRowError(
            f"has content of type {type(content).__name__} in message {place} ({role}): write text, JSON as text too"
        )
    try:
        texts_of(content)
    except ValueError as error:
        raise BadRowError(
            f"has {error} in message {place} ({role}), and only text can be trained on: remove the part, or the row"
        ) from None
    return message


def _without_none(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call, and its function, without fields that are None."""
    kept = {key: value for key, value in call.items() if value is not None}
    function = kept.get("function")
    if isinstance(function, Mapping):
        kept["function"] = {key: value for key, value in function.items() if value is not None}
    return kept


def texts_of(content: str | Sequence[Any] | None) -> list[str]:
    """The texts of a message's content, one for each part of it.

    Raises:
        ValueError: a part is no text, such as an image; the message names it.
    """
    if not isinstance(content, list | tuple):
        return [] if content is None else [str(content)]
    texts = content_parts(content)
    for part, text in zip(content, texts, strict=True):
        if text is None:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a part of type {kind!r}")
    return [text for text in texts if text is not None]


def read_tools(value: object) -> list[Any] | None:
    """The column `tools`: a list of schemas or functions, also as JSON text; None if the row has none.

    Raises:
        BadRowError: something else.
    """
    tools = _from_json(value, "tools")
    if tools is None or tools == []:  # Llama's template writes a heading for an empty list
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise BadRowError(
            f"has tools that are not a list of schemas: {shorten(repr(value), 60)}. The chat template gets this column; rename "
            "it if it is for reward functions only"
        )
    return [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools]


def read_template_kwargs(value: object) -> dict[str, Any]:
    """The column `chat_template_kwargs`: a mapping, also as JSON text; empty if the row has none.

    Raises:
        BadRowError: something else.
    """
    kwargs = _from_json(value, "chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise BadRowError(f"has chat_template_kwargs that are not a mapping: {shorten(repr(value), 60)}")
    return {str(name): one for name, one in kwargs.items()}


def _from_json(value: object, column: str) -> object:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRowError(f"has {column} that are not JSON ({first_line(error)}): {shorten(repr(value), 60)}") from None
