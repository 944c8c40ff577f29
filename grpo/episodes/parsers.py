"""From the text of a turn to its tool calls, in the forms in which models write them.

    parse = parser_named("hermes", tokenizer, schemas)
    parsed = parse('I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', prefix="")
    parsed.content, parsed.calls[0].name, parsed.calls[0].arguments        # ("I add.", "add", {"a": 1})

A call that does not parse is a call with an `error`, a sentence for the model. Nothing that a model can write is an exception.
What is between `<think>` and `</think>` is no place for calls.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..common.errors import first_line
from ..data.hermes import Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = ("response_template", "hermes", "llama", "qwen_xml")
"""In the order in which they are tried."""

TEXT_PARSERS = ("hermes", "llama", "qwen_xml")
"""Those of this module."""

NOT_CLOSED = "the call is not complete: it has no {end!r} at its end"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCall:
    """A call in a text. `arguments`: as the model wrote them; a mapping if `error` is None. `id`: if the model wrote one."""

    text: str
    name: str | None = None
    arguments: Any = None
    error: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A turn's text besides its calls, and the calls in its order. `reasoning`: if the parser takes it out of the content."""

    content: str
    calls: tuple[FoundCall, ...] = ()
    reasoning: str | None = None


class Parser(Protocol):
    """Reads the text of a turn, special tokens included. `prefix`: what the prompt has begun of it, such as `<think>`."""

    def __call__(self, text: str, *, prefix: str) -> Parsed: ...


def parser_named(name: str, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Schema], *, closing: str = "") -> Parser:
    """The parser of this name: one of `BUILT_IN`, or one of vLLM.

    Args:
        closing: the token that closes a turn with calls, which response templates look for.

    Raises:
        ValueError: there is none, or the tokenizer has no response template.
    """
    if name == "hermes":
        return _TextParser(_hermes_call)
    if name == "llama":
        return _TextParser(_llama_call)
    if name == "qwen_xml":
        return _TextParser(_XmlCalls(schemas))
    if name == "response_template":
        from .model_parsers import ResponseTemplateParser

        return ResponseTemplateParser(tokenizer, schemas, closing)
    from .model_parsers import VllmParser

    return VllmParser(name, tokenizer, schemas)


MOST_LEVELS = 64
"""Of the arguments of a call."""


def checked(text: str, name: object, arguments: object, *, key: str = "arguments", id: str | None = None) -> FoundCall:
    """A call with these parts, or with the error that they have; `key`: how the arguments are called."""
    has_name = isinstance(name, str) and bool(name)
    if not _is_shallow([name, arguments], MOST_LEVELS):
        name_only = name if isinstance(name, str) and _is_unicode(name) else None
        return FoundCall(text=text, name=name_only, arguments=None, error=f"{key} is nested too deeply", id=id)
    error = None
    if not has_name:
        error = "the call has no name" if name in (None, "") else f"the name must be a text, not {_kind(name)}"
    elif arguments is None:
        error = f"the call has no {key}: write an object, {{}} if there are none"
    elif not isinstance(arguments, Mapping):
        error = f"{key} must be an object with the names of the parameters, not {_kind(arguments)}"
    elif not _is_unicode([name, arguments]):
        error = "the call has half of a surrogate pair, which is no character"
    elif not _is_finite(arguments):
        error = f"{key} has a number that is infinite or none, which is no JSON"
    shown = str(name) if has_name and _is_unicode(name) else None
    return FoundCall(text=text, name=shown, arguments=arguments, error=error, id=id)


def _is_shallow(value: object, levels: int) -> bool:
    """Whether lists and mappings are nested no deeper: what looks at them later recurses."""
    if not isinstance(value, Mapping | list | tuple):
        return True
    inner = value.values() if isinstance(value, Mapping) else value
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


# ------------------------------------------------------------------------------------------------------ calls in text


class _CallForm(Protocol):
    """A form of calls: where the next one begins, and how it is read."""

    def __call__(self, text: str, start: int) -> tuple[FoundCall | None, int, int] | None:
        """The first call at or behind a place, with its range; None in its place: it is text. None: no call begins."""
        ...


class _TextParser:
    """Calls of one form between ordinary text and thinking."""

    def __init__(self, form: _CallForm) -> None:
        self._form = form

    def __call__(self, text: str, *, prefix: str) -> Parsed:
        calls: list[FoundCall] = []
        said: list[str] = []
        place = 0
        for call, begin, end in _calls_outside_thinking(text, prefix, self._form):
            calls.append(call)
            said.append(text[place:begin])
            place = end
        content = "".join([*said, text[place:]])
        return Parsed(content=content.strip() if calls else content, calls=tuple(calls))


def _calls_outside_thinking(text: str, prefix: str, form: _CallForm) -> Iterator[tuple[FoundCall, int, int]]:
    """The calls of a text with their ranges. Of a call and a thinking part, the one that begins first contains the other."""
    place = end_of_thinking(text, prefix)
    while True:
        thinking = text.find("<think>", place)
        found = form(text, place)
        if thinking >= 0 and (found is None or thinking < found[1]):
            place = _behind(text, "</think>", thinking)
        elif found is None:
            return
        else:
            call, begin, place = found
            if call is not None:
                yield call, begin, place


def end_of_thinking(text: str, prefix: str) -> int:
    """Where the thinking ends that the prompt or the text begins with; 0 if there is none."""
    is_begun = prefix.rfind("<think>") > prefix.rfind("</think>")
    return _behind(text, "</think>", 0) if is_begun or text.lstrip().startswith("<think>") else 0


def _behind(text: str, mark: str, start: int) -> int:
    """The place behind the next mark; the end of the text if there is none."""
    found = text.find(mark, start)
    return len(text) if found < 0 else found + len(mark)


def _hermes_call(text: str, start: int) -> tuple[FoundCall, int, int] | None:
    """`<tool_call>{"name": .., "arguments": ..}</tool_call>`."""
    begin = text.find("<tool_call>", start)
    if begin < 0:
        return None
    inside = begin + len("<tool_call>")
    value, stop, error = _json_at(text, inside)
    close = re.compile(r"\s*</tool_call>").match(text, stop) if error is None else None
    if close is not None:
        return _from_json(text[begin : close.end()], value, ("arguments",)), begin, close.end()
    end = _behind(text, "</tool_call>", inside)
    if not text.endswith("</tool_call>", inside, end):
        error = error if error and text[inside:].strip() else NOT_CLOSED.format(end="</tool_call>")
    elif error is None:
        error = "there is more than one JSON value in the call: write each call by itself"
    return FoundCall(text=text[begin:end], name=_name_in(value), arguments=text[inside:end], error=error), begin, end


_LLAMA_BEGIN = re.compile(r'(?P<tag><\|python_tag\|>)|\{\s*"(?:name|parameters|arguments|type|function)"\s*:')


def _llama_call(text: str, start: int) -> tuple[FoundCall | None, int, int] | None:
    """`{"name": .., "parameters": ..}`, with or without `<|python_tag|>`; several are separated by `;`."""
    found = _LLAMA_BEGIN.search(text, start)
    if found is None:
        return None
    begin = found.start()
    value, stop, error = _json_at(text, found.end() if found["tag"] else begin)
    if error is not None:
        return FoundCall(text=text[begin:], arguments=text[begin:], error=error), begin, len(text)
    separator = re.compile(r"\s*;").match(text, stop)
    end = stop if separator is None else separator.end()
    is_call = found["tag"] is not None or _is_llama_call(value)
    return (_from_json(text[begin:stop], value, ("parameters", "arguments")) if is_call else None), begin, end


def _is_llama_call(value: object) -> bool:
    """Whether JSON without a tag is a call, as far as it goes: an answer may have a `name` too, but has more besides."""
    parts = {"name", "parameters", "arguments"}
    if isinstance(value, Mapping) and value.get("type") == "function":
        return True  # also with the rest in another form
    return isinstance(value, Mapping) and not parts.isdisjoint(value) and value.keys() <= parts | {"type", "function", "id"}


def _from_json(text: str, value: object, keys: Sequence[str]) -> FoundCall:
    if not isinstance(value, Mapping):
        return FoundCall(text=text, arguments=value, error=f"the call must be one JSON object, not {_kind(value)}")
    key = next((key for key in keys if key in value), keys[0])
    return checked(text, value.get("name"), value.get(key), key=key)


_XML_BEGIN = re.compile(r"<tool_call>\s*(?:<function=)?|<function=")
_XML_NAME = re.compile(r"(?P<name>[^>\n]*)>")
_XML_PARAMETER = re.compile(
    r"\s*<parameter=(?P<name>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>))", re.DOTALL
)
_XML_END = re.compile(r"\s*</function>(?:\s*</tool_call>)?")


class _XmlCalls:
    """`<function=name><parameter=x>value</parameter></function>`, with or without `<tool_call>` around it."""

    def __init__(self, schemas: Sequence[Schema]) -> None:
        functions = [schema.get("function", schema) for schema in schemas]
        self._parameters = {one["name"]: one.get("parameters", {}).get("properties", {}) for one in functions}

    def __call__(self, text: str, start: int) -> tuple[FoundCall, int, int] | None:
        begin = _XML_BEGIN.search(text, start)
        if begin is None:
            return None
        name = _XML_NAME.match(text, begin.end()) if begin[0].endswith("<function=") else None
        place = begin.end() if name is None else name.end()
        arguments: dict[str, Any] = {}
        types = self._parameters.get("" if name is None else name["name"].strip(), {})
        while name is not None and (parameter := _XML_PARAMETER.match(text, place)):
            arguments[parameter["name"].strip()] = _of_type(parameter["value"], types.get(parameter["name"].strip()))
            place = parameter.end()
        end = _XML_END.match(text, place)
        if name is not None and end is not None:
            written = text[begin.start() : end.end()]
            return checked(written, name["name"].strip(), arguments), begin.start(), end.end()
        closed = _behind(text, "</tool_call>" if begin[0].startswith("<tool_call>") else "</function>", begin.end())
        written = text[begin.start() : closed]
        error = (
            "the call has no <function=name>"
            if name is None
            else "its parameters must be <parameter=name>value</parameter>, and </function> must follow the last one"
        )
        called = None if name is None else name["name"].strip() or None
        return FoundCall(text=written, name=called, arguments=written, error=error), begin.start(), closed


def _of_type(text: str, schema: object) -> Any:
    """The value of a parameter: a text where its schema says so, otherwise JSON if it is that."""
    types = schema.get("type") if isinstance(schema, Mapping) else None
    if types == "string":
        return text
    value, end, error = _json_at(text, 0)
    return value if error is None and not text[end:].strip() else text


# --------------------------------------------------------------------------------------------------------------- JSON


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(number: str) -> float:
    """Python reads 1e999 as infinity."""
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is too large for a number")
    return value


_SPACE = re.compile(r"\s+")
_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def _json_at(text: str, place: int) -> tuple[Any, int, str | None]:
    """The JSON value at a place behind white space, where it ends, and why there is none."""
    space = _SPACE.match(text, place)
    start = place if space is None else space.end()
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return None, place, f"the call is not valid JSON: {error.msg} at character {error.pos - start}"
    except (ValueError, RecursionError) as error:
        return None, place, f"the call is not valid JSON: {first_line(error)}"
    return value, end, None


def _name_in(value: object) -> str | None:
    name = value.get("name") if isinstance(value, Mapping) else None
    return name if isinstance(name, str) and _is_unicode(name) and name else None


def _kind(value: object) -> str:
    kinds = {bool: "a truth value", str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _is_finite(value: object) -> bool:
    """Whether no number in JSON data is NaN or infinite: no file of JSON takes it."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return False
    return True


def _is_unicode(value: object) -> bool:
    """Whether texts in JSON data have no half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
