"""How a model's chat template writes a dialogue with tools: its calls, their results, other turns, and the ids between turns.

    dialect = Dialect(tokenizer, config.data, schemas=schemas, responds=False, tool_parser=None)
    reply = dialect.parse(turn.token_ids, before=held)                    # reply.message, reply.calls
    if turn.token_ids[-1] == dialect.closing_id(reply):
        held += [*turn.token_ids, *dialect.bridge(reply, reply.results(["5"]))]

What the model sampled is never decoded and encoded again: a turn's ids are followed by the bridge's. Everything that a run
needs of a template is proven when the dialect is made; a template that cannot do it is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import DataConfig
from ..data.hermes import FIRST_ID, Schema
from ..data.messages import BadRowError, Message, texts_of
from .bridges import ANOTHER, Bridges, Called, called_message, length_in_common, result_message
from .parsers import BUILT_IN, TEXT_PARSERS, FoundCall, Parsed, Parser, end_of_thinking, parser_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNNAMED = "unknown"
"""The name of a call that has none, in messages."""

_TAIL = 512
"""Tokens before a turn among which the header of the assistant's message is looked for."""

_PROBE = {"text": "qzx one é qzx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCall:
    """A call of a turn. `arguments`: as the model wrote them; a mapping if `error`, a sentence for the model, is None."""

    id: str
    name: str | None
    arguments: Any
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A turn of the model: its message in OpenAI's form, and its calls in their order.

    Calls with an error are in the message too; their arguments are the text that the model wrote.
    """

    message: Message
    calls: tuple[ParsedCall, ...] = ()

    def results(self, contents: Sequence[object]) -> list[Message]:
        """The messages of the role tool, from what each call is answered, in their order."""
        return [
            result_message(called, text_of_result(content))
            for called, content in zip(_called(self.calls), contents, strict=True)
        ]


class Dialect:
    """See the module's docstring.

    Attributes:
        is_native: the chat template writes tools itself; otherwise they are written in Hermes' form (`grpo/data/hermes.py`).
        parser_name: what reads the calls; None: there are no tools.
        closing_ids: the tokens that close a turn so that the dialogue goes on. Those that do not end a turn in the engine by
            themselves must be made to (`stop_token_ids`).

    Args:
        schemas: of the tools, which may be none.
        responds: the environment answers turns without a call.
        tool_parser: as in `rollout.tool_parser`.
        eos_token_ids: what ends a turn in the engine, besides the tokenizer's.

    Raises:
        ValueError: the template cannot be used like this; the message says why, and what to do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data_config: DataConfig,
        *,
        schemas: Sequence[Schema],
        responds: bool,
        tool_parser: str | None,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer, self._schemas = tokenizer, schemas
        self._bridges = Bridges(tokenizer, data_config, schemas=schemas, eos_token_ids=eos_token_ids)
        self._parser: Parser | None = None
        self.parser_name: str | None = None
        self.is_native = self._bridges.template.is_native
        self._header = self._header_of_turns()
        if schemas:
            self._bridges.prove_results([_name(schema) for schema in schemas])
            text, prefix = self._probe()
            self._call_marks = _marks_of_call(text, _name(schemas[0]))
            self.parser_name, self._parser = self._find_parser(tool_parser, text, prefix)
        if responds:
            self._bridges.prove_user()
        self.closing_ids = frozenset(self._bridges.closing.values())

    def closing_id(self, reply: Reply) -> int | None:
        """The token that must close this turn for the dialogue to go on. A turn that a stop string ended gets it as given.

        None: nothing can follow this turn, since it has no call, and the environment does not respond.
        """
        return self._bridges.closing.get(bool(reply.calls))

    def parse(self, token_ids: Sequence[int], *, before: Sequence[int] = (), num_calls: int = 0) -> Reply:
        """A turn's message and calls. Nothing that a model can write is an exception.

        Args:
            token_ids: of the turn; the token that ended it may be left out.
            before: all ids before the turn: they may have begun it, for instance with `<think>`.
            num_calls: calls before in this episode; ids are counted from there.
        """
        ids = list(token_ids)
        if ids and ids[-1] in self.closing_ids | self._bridges.eos_token_ids:
            ids.pop()
        parsed = self._parsed(self._decode(ids), self._prefix(before))
        message: Message = {"role": "assistant", "content": self._bridges.guard.remove(parsed.content)}
        if not parsed.calls and parsed.reasoning is None:
            message["content"] = self._decode(ids, skip_special_tokens=True)
        if parsed.reasoning is not None:
            message["reasoning_content"] = parsed.reasoning
        calls = [_numbered(call, num_calls + place) for place, call in enumerate(parsed.calls)]
        if calls:
            message["tool_calls"] = [_openai_form(*pair) for pair in zip(calls, parsed.calls, strict=True)]
        return Reply(message=message, calls=tuple(calls))

    def bridge(self, reply: Reply, messages: Sequence[Message], kwargs: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """The ids behind the closing token of a turn: separator, the new messages, generation prompt.

        It depends on the number, names and ids of the turn's calls and on the messages, and on nothing else.

        Args:
            messages: a result for each call, and turns of the environment (role user, system or tool). The content of a
                result is a text, or becomes JSON; that of the others is a text, or parts of text.
            kwargs: the row's `chat_template_kwargs`.

        Raises:
            ValueError: a call without a result; content that is no text; the template refuses the messages.
        """
        results = sum(message["role"] == "tool" for message in messages)
        if results < len(reply.calls):
            raise ValueError(f"{len(reply.calls)} calls, and {results} results: each call needs one")
        try:
            return self._bridges.ids(_called(reply.calls), [_written(message) for message in messages], kwargs)
        except BadRowError as error:
            raise ValueError(f"the dialogue {error}") from error

    # ------------------------------------------------------------------------------------------------------- reading

    def _parsed(self, text: str, prefix: str) -> Parsed:
        if self._parser is None:
            return Parsed(content=text)
        if self.parser_name in TEXT_PARSERS:
            begun = self._begun_call(prefix)
            text, prefix = begun + text, prefix.removesuffix(begun)
        parsed = self._parser(text, prefix=prefix)
        return parsed if self.parser_name in TEXT_PARSERS else self._without_begun_calls(parsed, text, prefix)

    def _begun_call(self, prefix: str) -> str:
        """The call that the prompt has begun for the model, such as `<tool_call>`; nothing if there is none."""
        begins, ends = self._call_marks
        place = prefix.rfind(begins) if begins else -1
        is_thought = prefix.rfind("<think>", 0, max(place, 0)) > prefix.rfind("</think>", 0, max(place, 0))
        return "" if place < 0 or is_thought or ends in prefix[place:] else prefix[place:]

    def _without_begun_calls(self, parsed: Parsed, text: str, prefix: str) -> Parsed:
        """What others' parsers take for ordinary text, or for a call, is an error if it is a call that is not complete."""
        begins, ends = self._call_marks
        if parsed.calls:
            *others, last = parsed.calls
            if last.error is None and ends not in text[text.rfind(begins) :]:
                last = replace(last, error=f"the call is not complete: it has no {ends!r} at its end")
            return replace(parsed, calls=(*others, last))
        start = end_of_thinking(parsed.content, prefix) if parsed.reasoning is None else 0
        begin = parsed.content.find(begins, start) if begins else -1
        if begin < 0:
            return parsed
        written = parsed.content[begin:]
        call = FoundCall(text=written, arguments=written, error="the call is not complete, or in another form than required")
        return replace(parsed, content=parsed.content[:begin].strip(), calls=(call,))

    def _prefix(self, before: Sequence[int]) -> str:
        """What the prompt has begun of the turn, from the header of the assistant's message on."""
        text = self._decode(before[-_TAIL:])
        place = text.rfind(self._header) if self._header else -1
        return text[place:] if place >= 0 else ""

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: Any = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    # ----------------------------------------------------------------------------------------------------- the proof

    def _header_of_turns(self) -> str:
        """What the generation prompt begins with, without the thinking that it may open."""
        try:
            opened = self._bridges.render(self._bridges.start)
            alone = self._bridges.render(self._bridges.start, is_complete=True)
        except BadRowError as error:
            raise ValueError(f"the chat template cannot be used: a dialogue {error}: {ANOTHER}") from error
        return opened[length_in_common(opened, alone) :].partition("<think>")[0].strip()

    def _probe(self) -> tuple[str, str]:
        """A turn with a call as the template writes it, without the closing token, and the prompt before it."""
        name = _name(self._schemas[0])
        start = self._bridges.start
        opened = self._bridges.render(start)
        message = called_message([Called(name, FIRST_ID)], _PROBE)
        text = self._bridges.render([*start, message], is_complete=True)
        prefixes = (opened, opened[: opened.rfind("<think>")] if "<think>" in opened else opened)
        prefix = next((prefix for prefix in prefixes if text.startswith(prefix)), None)
        if prefix is None:  # the generation prompt has more than the header, such as white space or a date
            shared = length_in_common(opened, text)
            is_begun = shared > text.find("qzxquestionqzx") and self._header and text[:shared].rstrip().endswith(self._header)
            prefix = text[: shared if is_begun else text.find(name, text.find("qzxquestionqzx"))]
        closing = str(self._tokenizer.convert_ids_to_tokens(self._bridges.closing[True]))
        turn = text[len(prefix) :]
        end = turn.find(closing, turn.find(_PROBE["text"]))
        return turn[:end] if end >= 0 else turn, prefix

    def _find_parser(self, name: str | None, text: str, prefix: str) -> tuple[str, Parser]:
        """The parser of this name, or the first that gives the probe's call back."""
        closing = str(self._tokenizer.convert_ids_to_tokens(self._bridges.closing[True]))
        errors, shown = [], text.rpartition("</think>")[2].strip()
        for one in BUILT_IN if name is None else (name,):
            try:
                parser = parser_named(one, self._tokenizer, self._schemas, closing=closing)
            except ValueError as error:
                errors.append(str(error))
                continue
            parsed = parser(text, prefix=prefix)
            calls = [(call.name, call.arguments, call.error) for call in parsed.calls]
            # What is around the call must be a part of it; others' parsers have their own ideas of content.
            rest = self._bridges.guard.remove(parsed.content).rpartition("</think>")[2].strip()
            is_all = one not in TEXT_PARSERS or not rest
            if calls == [(_name(self._schemas[0]), _PROBE, None)] and is_all:
                return one, parser
        if name is not None:
            reason = errors[0] if errors else f"it does not read the calls that the chat template writes: {shown!r}"
            raise ValueError(f"rollout.tool_parser={name}: {reason}: set another one, or another data.chat_template")
        raise ValueError(
            f"no parser reads the calls that the chat template writes ({shown!r}): set rollout.tool_parser to the name of "
            f"vLLM's parser for this model, give its tokenizer a response_template, or {ANOTHER}"
        )


def _marks_of_call(text: str, name: str) -> tuple[str, str]:
    """How a turn with a call begins the call, up to white space, and how it ends: with a tag, or one character."""
    begins = text.partition(name)[0].rpartition("</think>")[2].split()
    ending = text.rpartition(_PROBE["text"])[2].rstrip()
    tag = re.search(r"<[^<>]*>\Z", ending)
    return begins[0] if begins else "", ending[-1:] if tag is None else tag[0]


def text_of_result(value: object) -> str:
    """What a tool returned as the text of a message: a text stays as it is, anything else becomes JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=_jsonable)
    except (TypeError, ValueError, RecursionError):  # such as keys that are tuples, or a list in itself
        return str(value)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("model_dump", "tolist"):  # pydantic's models; arrays, tensors, and numbers of NumPy
        if callable(convert := getattr(value, method, None)):
            return convert()
    return str(value)


def _written(message: Message) -> Message:
    """The message with its content as one text."""
    content = message.get("content")
    text = text_of_result(content) if message["role"] == "tool" else "".join(texts_of(content))
    return {**message, "content": _encodable(text)}


def _encodable(text: str) -> str:
    """The text with halves of surrogate pairs, which no tokenizer takes, joined or replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _numbered(call: FoundCall, number: int) -> ParsedCall:
    id = call.id or f"call{number:05d}"
    return ParsedCall(id=id, name=call.name, arguments=call.arguments, error=call.error)


def _openai_form(call: ParsedCall, found: FoundCall) -> dict[str, Any]:
    arguments = call.arguments if call.error is None else found.text
    return {"type": "function", "id": call.id, "function": {"name": call.name or UNNAMED, "arguments": arguments}}


def _called(calls: Sequence[ParsedCall]) -> list[Called]:
    return [Called(call.name or UNNAMED, call.id) for call in calls]


def _name(schema: Schema) -> str:
    return str(schema.get("function", schema)["name"])
