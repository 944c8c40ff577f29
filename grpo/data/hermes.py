"""Tools in the chat templates of all models: as the template writes them, or, if it knows none, in Hermes' form.

    template = ToolTemplate(ChatTemplate(tokenizer, {}))
    template.is_native                                          # False for SmolLM2, Gemma 1 to 3, Phi-3
    template.render(messages, tools=schemas).text

Hermes' form: a block with the schemas in the system message (in the first user message if the template refuses a system role),
calls as `<tool_call>{"name": .., "arguments": ..}</tool_call>` in the assistant's text, and results in messages of the role
`tool`. A template that refuses or loses that role gets all results of a turn in one user message, each in `<tool_response>`.

What a template knows is found by rendering a probe and looking for its parts, not by the template's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from .messages import BadRowError, Message, texts_of
from .templates import ChatTemplate, Rendered, with_arguments

Schema = Mapping[str, Any]
"""A tool in OpenAI's form, as `transformers.utils.get_json_schema` returns it."""

HEADING = "# Tools\n\nYou may call these functions. Their signatures are inside <tools></tools>, one JSON object per line:"
HOW_TO_CALL = (
    "To call a function, write a JSON object with its name and its arguments inside <tool_call></tool_call>:\n"
    '<tool_call>\n{"name": <function name>, "arguments": <JSON object with the arguments>}\n</tool_call>'
)
FIRST_ID = "call00000"
"""Ids of nine letters and digits suit all templates; Mistral's accept no others."""

_PROBE_PARAMETER = {"type": "string", "description": "qzxparameterqzx"}
PROBE = {
    "type": "function",
    "function": {
        "name": "qzxtoolqzx",
        "description": "qzxdescriptionqzx",
        "parameters": {"type": "object", "properties": {"qzxkeyqzx": _PROBE_PARAMETER}, "required": ["qzxkeyqzx"]},
    },
}
_USER: Message = {"role": "user", "content": "qzxquestionqzx"}
_CALL = {
    "type": "function",
    "id": FIRST_ID,
    "function": {"name": "qzxtoolqzx", "arguments": {"qzxkeyqzx": "qzxvalueqzx"}},
}


class ToolTemplate:
    """A chat template that writes tools, calls and results."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @cached_property
    def is_native(self) -> bool:
        """Whether the template itself writes the schemas of tools, the assistant's calls, and their results."""
        return self._knows_schemas() and self._knows_calls()

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template takes a message of the role system."""
        return self._renders([{"role": "system", "content": "qzxsystemqzx"}, _USER])

    @cached_property
    def takes_results(self) -> bool:
        """Whether it takes messages of the role tool behind a plain assistant's message, and writes them alike each time."""
        turn = [{"role": "assistant", "content": "qzxsaysqzx"}, _result("qzxresultqzx"), _result("qzxresultqzx")]
        if not self._renders([_USER, *turn, *turn]):
            return False
        once, twice = (self._template.render([_USER, *turn * times]).text for times in (1, 2))
        return once.rpartition("qzxsaysqzx")[2] == twice.rpartition("qzxsaysqzx")[2]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Schema] | None,
        kwargs: Mapping[str, Any] | None = None,
        is_complete: bool = False,
    ) -> Rendered:
        """A conversation with the schemas of its tools; the arguments and errors are those of `ChatTemplate.render`."""
        if messages[-1]["role"] == "assistant" and messages[-1].get("tool_calls") and not is_complete:
            raise BadRowError("ends with a tool call: add its result, a message of the role tool")
        schemas = [dict(tool) for tool in tools or ()] or None  # Llama's template writes a heading for an empty list
        if schemas is None and not _uses_tools(messages):
            return self._template.render(messages, kwargs=kwargs, is_complete=is_complete)
        if self.is_native:
            return self._template.render(messages, tools=schemas, kwargs=kwargs, is_complete=is_complete)
        return self._template.render(self._in_hermes_form(messages, schemas), kwargs=kwargs, is_complete=is_complete)

    # -------------------------------------------------------------------------------------------------- Hermes' form

    def _in_hermes_form(self, messages: Sequence[Message], schemas: Sequence[Schema] | None) -> list[Message]:
        shaped = [_with_calls_as_text(message) for message in messages]
        if not self.takes_results:
            shaped = _with_results_as_user(shaped)
        return shaped if schemas is None else self._with_block(shaped, schemas_as_text(schemas))

    def _with_block(self, messages: list[Message], block: str) -> list[Message]:
        """The messages with the block of schemas in the system message, or in the first user message."""
        first = messages[0]
        if first["role"] == "system":
            return [{**first, "content": f"{_text(first)}\n\n{block}"}, *messages[1:]]
        if self.takes_system:
            return [{"role": "system", "content": block}, *messages]
        place = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
        if place is None:
            raise BadRowError("has no user message, in which the chat template could have the tools: add one")
        asked = {**messages[place], "content": f"{block}\n\n{_text(messages[place])}"}
        return [*messages[:place], asked, *messages[place + 1 :]]

    # ----------------------------------------------------------------------------------------------------- the proof

    def _knows_schemas(self) -> bool:
        try:
            text = self._template.render([_USER], tools=[PROBE]).text
        except BadRowError:
            return False
        return "qzxtoolqzx" in text and "qzxdescriptionqzx" in text

    def _knows_calls(self) -> bool:
        called: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        try:
            rendered = self._template.render([_USER, called, _result("qzxresultqzx")], tools=[PROBE])
        except BadRowError:
            return False
        written = ("qzxtoolqzx", "qzxkeyqzx", "qzxvalueqzx", "qzxresultqzx")
        return not rendered.loses_calls and all(part in rendered.text for part in written)

    def _renders(self, messages: list[Message]) -> bool:
        try:
            self._template.render(messages)
        except BadRowError:
            return False
        return True


def schemas_as_text(schemas: Sequence[Schema]) -> str:
    """The block that tells a model which functions it may call, and how."""
    lines = [json.dumps(schema, ensure_ascii=False) for schema in schemas]
    return "\n".join([HEADING, "<tools>", *lines, "</tools>", "", HOW_TO_CALL])


def call_as_text(call: Mapping[str, Any]) -> str:
    """A call of `tool_calls` as a model writes it in Hermes' form."""
    of_mapping = with_arguments(call, "mapping")
    function = of_mapping.get("function", of_mapping)
    written = {"name": function.get("name"), "arguments": function.get("arguments")}
    return f"<tool_call>\n{json.dumps(written, ensure_ascii=False, default=str)}\n</tool_call>"


def _with_calls_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    said = _text(message)
    text = "\n".join([*([said] if said else []), *map(call_as_text, calls)])
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def _with_results_as_user(messages: Sequence[Message]) -> list[Message]:
    """The messages with one user message for all results that follow each other."""
    shaped: list[Message] = []
    is_open = False
    for message in messages:
        if message["role"] != "tool":
            shaped.append(message)
            is_open = False
            continue
        text = f"<tool_response>\n{_text(message)}\n</tool_response>"
        if is_open:
            shaped[-1]["content"] += f"\n{text}"
        else:
            shaped.append({"role": "user", "content": text})
        is_open = True
    return shaped


def _text(message: Message) -> str:
    return "".join(texts_of(message.get("content")))


def _uses_tools(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _result(text: str) -> Message:
    return {"role": "tool", "name": "qzxtoolqzx", "tool_call_id": FIRST_ID, "content": text}
