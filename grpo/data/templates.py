"""Conversations as text: what a chat template makes of them.

    template = ChatTemplate(tokenizer, {"enable_thinking": False})
    template.render(messages, tools=tools, kwargs={}).text      # "<|im_start|>user\n..."

Chat templates differ in the messages that they take. Some print the `repr` of content in parts, or "None" for content that is
None; some take a tool call's arguments only as a mapping, others only as JSON text. `render` tries these forms in turn, and
takes the first one that the template does not refuse and that loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from ...rewards.loading import find_file
from ..common.errors import first_line
from ..config.paths import is_template_file
from .messages import BadRowError, Message, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "qzxmarkqzx"
"""A text that no template contains."""

SET_HERE = frozenset({"conversation", "tokenize", "add_generation_prompt", "continue_final_message"})
"""Arguments of a template that are no variables."""

CALLS = "tool calls"
"""In the place of a role."""

NO_TEMPLATE = (
    "the prompts are conversations, but the model's tokenizer has no chat template: set data.chat_template, use an "
    "instruction-tuned model, or plain-text prompts without data.system_prompt"
)


def template_text(template: str) -> str:
    """The text of `data.chat_template`, which may name a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no text.
    """
    if not is_template_file(template):
        return template
    try:
        return find_file(template).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.chat_template: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"data.chat_template: {template} is not UTF-8 text") from error


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation in the chat template. `loses_calls`: the template leaves out its tool calls."""

    text: str
    loses_calls: bool = False


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer with the keyword arguments of all rows.

    Raises:
        ValueError: the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    _losses: dict[tuple[object, ...], set[str]] = field(default_factory=dict, repr=False)
    """The roles whose messages a form of a conversation loses, by the roles and tool calls of its messages."""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError(NO_TEMPLATE)
        if taken := SET_HERE & self.kwargs.keys():
            raise ValueError(f"data.chat_template_kwargs: {', '.join(sorted(taken))} is set for each conversation: remove it")

    def takes(self, variable: str) -> bool:
        """Whether the template looks at a variable, such as `tools`."""
        return variable in str(self.tokenizer.chat_template)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        is_complete: bool = False,
    ) -> Rendered:
        """A conversation, with the generation prompt added; if it ends with an assistant's message, that message is left open
        for the model to continue.

        Args:
            tools: schemas or functions that the model may call; None: those in the keyword arguments.
            kwargs: variables of the template for this row, which take precedence.
            is_complete: nothing follows: no generation prompt, and an assistant's message at the end is not left open.

        Raises:
            BadRowError: the template refuses the conversation, or leaves out messages other than the assistant's; or the
                conversation ends with a tool call.
            ValueError: the template has a syntax error.
        """
        if messages[-1]["role"] == "assistant" and messages[-1].get("tool_calls") and not is_complete:
            raise BadRowError("ends with a tool call: add its result, a message of the role tool")
        options = {**self.kwargs, **(kwargs or {}), **({} if tools is None else {"tools": tools})}
        if taken := SET_HERE & options.keys():
            raise BadRowError(f"has {', '.join(sorted(taken))} in chat_template_kwargs, which is set here: remove it")
        reason, second_best = "", None
        for form in self._forms(messages):
            shaped = [self._shaped(message, form) for message in messages]
            try:
                text = self._apply(shaped, options, is_complete)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"the chat template has a mistake in line {error.lineno}: {error.message}") from error
            except Exception as error:  # a template may raise anything
                reason = reason or f"is refused by the chat template: {first_line(error)}"
                continue
            lost = self._lost_roles(shaped, form, options, is_complete)
            if not lost:
                return Rendered(text)
            if lost == {CALLS}:
                second_best = second_best or Rendered(text, loses_calls=True)
                continue
            roles = " and ".join(sorted(lost - {CALLS}))
            reason = (
                f"has messages of the role {roles}, which the chat template leaves out: remove them, or set another "
                "data.chat_template"
            )
        if second_best is not None:
            return second_best
        raise BadRowError(reason)

    # --------------------------------------------------------------------------------------------------------- forms

    def _forms(self, messages: Sequence[Message]) -> Iterator[Form]:
        """The forms to try: several only if there are tool calls or content that is None."""
        is_empty = any(not message.get("content") for message in messages)
        has_calls = any(message.get("tool_calls") for message in messages)
        for arguments in ("mapping", "text") if has_calls else ("mapping",):
            for empty in ("", None) if is_empty else ("",):
                yield Form(empty=empty, arguments=arguments)

    def _shaped(self, message: Message, form: Form) -> Message:
        content = message.get("content")
        is_parts = isinstance(content, list | tuple)
        texts = texts_of(content)
        shaped = {**message, "content": "".join(texts)}
        if not content and message["role"] == "assistant" and form.empty is None:
            shaped["content"] = None
        elif self._content == "parts" or (is_parts and self._content == "both"):
            shaped["content"] = [{"type": "text", "text": text} for text in texts or [""]]
        if message.get("tool_calls"):
            shaped["tool_calls"] = [with_arguments(call, form.arguments) for call in message["tool_calls"]]
        return shaped

    @cached_property
    def _content(self) -> Literal["text", "parts", "both"]:
        """The form of content that the template takes, from what it makes of one message in both."""
        of_text, of_parts = (
            self._try([{"role": "user", "content": content}], self.kwargs)
            for content in (MARK, [{"type": "text", "text": MARK}])
        )
        if MARK in of_text:
            return "both" if of_text == of_parts else "text"
        return "parts" if MARK in of_parts else "text"

    def _lost_roles(
        self, shaped: Sequence[Message], form: Form, options: Mapping[str, Any], is_complete: bool
    ) -> set[str]:
        """The roles whose messages are not in the text, and `CALLS` if a tool call is not.

        An assistant's text may be missing: templates leave out its thoughts, or what it says besides a tool call.
        """
        kinds = tuple((one["role"], bool(one["content"]), len(one.get("tool_calls") or ())) for one in shaped)
        variables = {name: value for name, value in options.items() if name != "tools"}
        key = (form, kinds, "tools" in options, json.dumps(variables, default=str, sort_keys=True))
        if key not in self._losses:
            text = self._try([_marked(message, place) for place, message in enumerate(shaped)], options, is_complete)
            self._losses[key] = {
                role
                for place, message in enumerate(shaped)
                for mark, role in _marks(message, place)
                if text and mark not in text  # no text: the template refuses the marks
            }
        return self._losses[key]

    # ------------------------------------------------------------------------------------------------------ rendering

    def _apply(self, messages: Sequence[Message], options: Mapping[str, Any], is_complete: bool = False) -> str:
        is_open = messages[-1]["role"] == "assistant" and not is_complete
        rendered: Any = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=not (is_open or is_complete),
            continue_final_message=is_open,
            **options,
        )
        return rendered

    def _try(self, messages: Sequence[Message], options: Mapping[str, Any], is_complete: bool = False) -> str:
        """The text, or none if the template refuses the messages."""
        try:
            return self._apply(messages, options, is_complete)
        except Exception:  # a template may raise anything
            return ""


@dataclass(frozen=True, slots=True)
class Form:
    """How an assistant's message without content, and the arguments of its tool calls, are written."""

    empty: Literal[""] | None
    arguments: Literal["mapping", "text"]


def with_arguments(call: Mapping[str, Any], form: Literal["mapping", "text"]) -> dict[str, Any]:
    """A tool call with its arguments as a mapping or as JSON text; text that is no JSON object stays as it is."""
    is_nested = isinstance(call.get("function"), Mapping)
    function = call["function"] if is_nested else call
    arguments = function.get("arguments")
    if form == "text" and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif form == "mapping" and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    else:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}} if is_nested else {**call, "arguments": arguments}


def _marks(message: Message, place: int) -> Iterator[tuple[str, str]]:
    """The marks of a message that the text must contain, and the role that is lost without them."""
    if message["content"] and message["role"] != "assistant":
        yield f"{MARK}{place}x", message["role"]
    for number, _ in enumerate(message.get("tool_calls") or ()):
        yield f"{MARK}{place}y{number}y", CALLS


def _marked(message: Message, place: int) -> Message:
    """The message with marks for its text and for the names of the functions that it calls."""
    marked = dict(message)
    if message["content"] and message["role"] != "assistant":
        mark = f"{MARK}{place}x"
        is_text = isinstance(message["content"], str)
        marked["content"] = mark if is_text else [{"type": "text", "text": mark}]
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            _with_name(call, f"{MARK}{place}y{number}y") for number, call in enumerate(message["tool_calls"])
        ]
    return marked


def _with_name(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}
