"""Parsers of tool calls that others made: a tokenizer's response template, and vLLM's, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...rollout.vllm_compat import import_vllm
from ..common.errors import first_line
from ..data.hermes import Schema
from .parsers import BUILT_IN, FoundCall, Parsed, checked, end_of_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNDER_WAY = "\n\x00"
"""Behind the closing token, it lets a response parser decide what it has read so far."""


class ResponseTemplateParser:
    """The `response_template` of a tokenizer, as `tokenizer.parse_response` reads it.

    If one call of a turn is no JSON, the turn has that error alone, and none of its calls.

    Raises:
        ValueError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Schema], closing: str) -> None:
        if getattr(tokenizer, "response_template", None) is None:
            raise ValueError("the tokenizer has no response_template")
        self._tokenizer, self._closing = tokenizer, closing
        self._tools: list[Any] = [dict(schema) for schema in schemas]

    def __call__(self, text: str, *, prefix: str) -> Parsed:
        try:
            read: Any = self._tokenizer.parse_response(text + self._closing, prefix=prefix, tools=self._tools)
            if self._ends_in_a_call(text, prefix):
                return _one_error(text, "the call is not complete")
        except Exception as error:  # a template may ask for anything of the text
            return _one_error(text, f"the call does not parse: {first_line(error)}")
        reasoning = read.get("reasoning_content") or read.get("thinking")
        calls = tuple(_call_in(call) for call in read.get("tool_calls") or ())
        return Parsed(content=_as_text(read.get("content")), calls=calls, reasoning=reasoning)

    def _ends_in_a_call(self, text: str, prefix: str) -> bool:
        """Whether a call has begun and not ended."""
        parser: Any = self._tokenizer.get_response_parser(prefix=prefix, tools=self._tools)
        events = parser.initial_events + parser.feed(text + self._closing + _UNDER_WAY)
        of_calls = [event["type"] for event in events if event["field"] == "tool_calls"]
        return of_calls.count("region_open") > of_calls.count("region_close")


class VllmParser:
    """A tool parser of vLLM.

    Raises:
        ValueError: vLLM is not installed, has no parser of this name, or it does not work with this tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Schema]) -> None:
        import_vllm()
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        tools = [dict(schema) for schema in schemas]
        messages = [{"role": "user", "content": ""}]
        self._request: Any = ChatCompletionRequest.model_validate({"messages": messages, "model": "", "tools": tools})
        try:
            parser_class: Any = ToolParserManager.get_tool_parser(name)
            self._parser = parser_class(tokenizer, self._request.tools)
        except KeyError:
            known = sorted({*BUILT_IN, *ToolParserManager.lazy_parsers, *ToolParserManager.tool_parsers})
            raise ValueError(f"there is no parser {name!r}: there are {', '.join(known)}") from None
        except Exception as error:  # such as a tokenizer without the tokens of its calls
            raise ValueError(f"vLLM's parser {name!r} does not work with this tokenizer: {first_line(error)}") from error

    def __call__(self, text: str, *, prefix: str) -> Parsed:
        place = end_of_thinking(text, prefix)
        try:
            found = self._parser.extract_tool_calls(text[place:], self._request)
        except Exception as error:  # vLLM's parsers raise whatever they meet
            return _one_error(text, f"the call does not parse: {first_line(error)}")
        if not found.tools_called:
            return Parsed(content=text)
        calls = tuple(_of_vllm(call, text) for call in found.tool_calls)
        return Parsed(content=text[:place] + _as_text(found.content), calls=calls)


def _of_vllm(call: Any, text: str) -> FoundCall:
    """A call that vLLM found; its id is random unless the model wrote it."""
    function, id = call.function, call.id if call.id and call.id in text else None
    return checked(str(function.arguments), function.name, _from_json(function.arguments), id=id)


def _one_error(text: str, error: str) -> Parsed:
    return Parsed(content="", calls=(FoundCall(text=text, arguments=text, error=error),))


def _call_in(call: object) -> FoundCall:
    """A call in OpenAI's form, whatever it lacks."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return FoundCall(text=str(call), arguments=call, error="the call must be an object with a name and arguments")
    written = json.dumps(function, ensure_ascii=False, default=str)
    return checked(written, function.get("name"), _from_json(function.get("arguments")))


def _from_json(arguments: object) -> object:
    """The value of arguments in JSON; a text that is none stays one."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _as_text(content: object) -> str:
    return content if isinstance(content, str) else ""
