"""What a chat template writes between two turns of the model: separator, results or a user's turn, generation prompt.

    bridges = Bridges(tokenizer, data_config, schemas=schemas, eos_token_ids=(2,))
    bridges.prove_results(["add"])                               # ValueError: the template cannot be used with tools
    bridges.ids([Called("add", "call00000")], [result])          # ids behind the token that closes the turn

The model's turns are never rendered again. A dialogue with stand-ins for all that came before is rendered, and cut behind the
token that closes the assistant's turn. What remains must not depend on the stand-ins; that is proven once.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...rollout.texts import special_tokens
from ..config import DataConfig
from ..data.hermes import FIRST_ID, Schema
from ..data.messages import BadRowError, Message
from ..data.renderer import PromptRenderer
from ..data.special_tokens import SpecialTokenGuard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANOTHER = "set another data.chat_template"
_MARK = f"qzx{secrets.token_hex(8)}qzx"
"""In the assistant's stand-in, and in no text that anybody writes."""
_FIRST, _SECOND = "qzxfirstqzx", "qzxsecondqzx"


@dataclass(frozen=True, slots=True)
class Called:
    """A call as far as the text behind it may depend on it."""

    name: str
    id: str


class Bridges:
    """See the module's docstring.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        schemas: Sequence[Schema],
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self.template = PromptRenderer(tokenizer, config).template
        of_tokenizer: Any = tokenizer.eos_token_id
        self.eos_token_ids = frozenset(eos_token_ids) | ({of_tokenizer} - {None})
        self.guard = SpecialTokenGuard(tokenizer, more=self.eos_token_ids)
        self._special = frozenset(special_tokens(tokenizer).values()) | self.eos_token_ids
        self._schemas = self.guard.hide_all(list(schemas))
        self._has_one_call = False  # the template refuses several calls in a message
        self.closing: dict[bool, int] = {}
        """The token that closes a turn with calls (True), and one without (False), as far as proven."""

    @property
    def start(self) -> list[Message]:
        """A dialogue's stand-in, up to the turn of the assistant."""
        system: list[Message] = [{"role": "system", "content": "qzxsystemqzx"}] if self.template.takes_system else []
        return [*system, {"role": "user", "content": "qzxquestionqzx"}]

    def render(self, messages: Sequence[Message], kwargs: Mapping[str, Any] | None = None, *, is_complete: bool = False) -> str:
        """The text of a dialogue, with the tools.

        Raises:
            BadRowError: the template refuses it.
        """
        return self.template.render(messages, tools=self._schemas, kwargs=kwargs, is_complete=is_complete).text

    def text(
        self,
        calls: Sequence[Called],
        messages: Sequence[Message],
        kwargs: Mapping[str, Any] | None = None,
        *,
        earlier: Sequence[Message] = (),
    ) -> str:
        """The text behind the closing token of a turn with these calls, up to and including the generation prompt.

        Args:
            messages: those that follow.
            kwargs: variables of the template for the row.
            earlier: messages between the beginning and the turn; they must not matter.

        Raises:
            BadRowError: the template refuses the messages.
        """
        behind = self._behind_mark([*self.start, *earlier, self._turn(calls), *messages], kwargs)
        _, closing, text = behind.partition(self._name(self.closing[bool(calls)]))
        if not closing:
            raise BadRowError("gets no closing token behind the assistant's turn with these chat_template_kwargs")
        return text

    def ids(
        self, calls: Sequence[Called], messages: Sequence[Message], kwargs: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """The same as token ids. Special tokens in contents and names are encoded as text.

        Raises:
            BadRowError: the template refuses the messages.
        """
        hidden = [{**self.guard.hide_all(message), "role": message["role"]} for message in messages]
        named = [Called(self.guard.hide(call.name), self.guard.hide(call.id)) for call in calls]
        text = self.text(named, hidden, kwargs)
        return tuple(self.guard.encode(text, behind=self.closing[bool(calls)]))

    # ----------------------------------------------------------------------------------------------------- the proof

    def prove_results(self, names: Sequence[str]) -> None:
        """Prove that the template writes one result of a turn, and two; `names`: of the tools that the probes call.

        Raises:
            ValueError: it does not; the message says why, and what to do.
        """
        two = [Called(names[0], FIRST_ID), Called(names[-1], "call00001")]
        results = [result_message(call, text) for call, text in zip(two, (_FIRST, _SECOND), strict=True)]
        one = "a tool's result"
        self._prove(two[:1], results[:1], one)
        try:
            self.render([*self.start, self._turn(two), *results])
        except BadRowError:
            self._has_one_call = True
        self._prove(two, results, "two results of one turn")

    def prove_user(self) -> None:
        """Prove that the template writes a user's turn behind the assistant's.

        Raises:
            ValueError: it does not.
        """
        self._prove([], [{"role": "user", "content": _FIRST}], "a user's turn")

    def _prove(self, calls: list[Called], messages: list[Message], what: str) -> None:
        try:
            if bool(calls) not in self.closing:
                self.closing[bool(calls)] = self._find_closing(calls, messages)
            text = self.text(calls, messages)
            earlier: list[Message] = [self._turn(calls), *messages]
            later = [self.text(calls, messages, earlier=earlier * turns) for turns in (1, 4)]
        except BadRowError as error:
            raise ValueError(f"the chat template cannot write {what}: the dialogue {error}: {ANOTHER}") from error
        places = [text.find(str(message["content"])) for message in messages]
        if -1 in places or any(first >= second for first, second in pairwise(places)):
            raise ValueError(f"the chat template loses {what}, or writes them in another order: {ANOTHER}")
        if any(one != text for one in later):
            raise ValueError(f"the chat template writes {what} otherwise in a later turn of a dialogue: {ANOTHER}")
        closing = self.closing[bool(calls)]
        ids = self._tokenizer(self._name(closing) + text, add_special_tokens=False)["input_ids"]
        if ids[:1] != [closing]:
            raise ValueError(f"the tokenizer does not keep {self._name(closing)!r}, which closes a turn, in front of {what}")

    def _find_closing(self, calls: list[Called], messages: list[Message]) -> int:
        """The token that the model ends its turn with, so that these messages can follow.

        It is the first end-of-sequence token behind the turn, or else the last special token that the template writes behind
        the turn whether or not something follows.

        Raises:
            ValueError: there is none.
        """
        turn = [*self.start, self._turn(calls)]
        followed = self._behind_mark([*turn, *messages])
        gap = followed.partition(str(messages[0]["content"]))[0]
        ends = [id for id in self._encode(gap) if id in self.eos_token_ids]
        if ends:
            return ends[0]
        alone = self._behind_mark(turn, is_complete=True)
        special = [id for id in self._encode(gap[: length_in_common(gap, alone)]) if id in self._special]
        if not special:
            kind = "a turn with tool calls" if calls else "a turn"
            raise ValueError(
                f"the chat template closes {kind} by no end-of-sequence token, so nothing can follow it: {ANOTHER}"
            )
        return special[-1]

    def _behind_mark(
        self, messages: Sequence[Message], kwargs: Mapping[str, Any] | None = None, *, is_complete: bool = False
    ) -> str:
        """The text behind the last mark: behind what the assistant has written."""
        _, mark, behind = self.render(messages, kwargs, is_complete=is_complete).rpartition(_MARK)
        if not mark:
            raise BadRowError("loses the assistant's turn in the chat template")
        return behind

    def _turn(self, calls: Sequence[Called]) -> Message:
        """The assistant's stand-in, which ends with the mark."""
        if not calls:
            return {"role": "assistant", "content": _MARK}
        return called_message(calls[-1:] if self._has_one_call else calls, {"qzxkeyqzx": _MARK})

    def _encode(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))


def length_in_common(first: str, second: str) -> int:
    """Characters at the beginning of both texts."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def called_message(calls: Sequence[Called], arguments: Mapping[str, Any]) -> Message:
    """An assistant's message with these calls, all with the same arguments."""
    functions: Iterator[dict[str, Any]] = ({"name": call.name, "arguments": dict(arguments)} for call in calls)
    tool_calls = [
        {"type": "function", "id": call.id, "function": function} for call, function in zip(calls, functions, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def result_message(call: Called, text: str) -> Message:
    """The result of a call."""
    return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}
