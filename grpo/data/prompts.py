"""From rows to tokenized prompts.

    data = prepare_prompts(rows, tokenizer, max_prompt_length=512)
    data.rows[0].token_ids, data.dropped

A prompt is a text, which is tokenized unchanged, or a conversation (a list of {"role", "content"}), which is rendered by the
tokenizer's chat template, with the tools and variables of the row. A system prompt turns a text into a conversation. All other
columns go to the reward functions.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...rewards.runner import check_column_names
from ..config import DataConfig
from .hermes import Schema
from .messages import BadRowError, Message, read_prompt, read_template_kwargs, read_tools, texts_of
from .renderer import PromptRenderer
from .templates import ChatTemplate, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAG = r"<[A-Za-z_][\w.-]*>"
_FIRST_TAG = re.compile(_TAG)
_LAST_TAG = re.compile(rf"(?P<tag>{_TAG})\s*\Z")
_LONGEST_LAST_TAG = 100
_ERRORS_IN_SUMMARY = 20

ToolsOfRow = Callable[[Mapping[str, Any]], Sequence[Schema] | None]
"""From a row to the schemas of the tools that its episodes have."""

REMARKS = {
    "from_text": "are conversations as text (JSON or Python's notation): they are read, and go through the chat template",
    "plain": "are plain text, which skips the model's chat template: write conversations, or set data.system_prompt",
    "continued": "end with an assistant's message, which the completion continues (an answer to learn is no part of a prompt)",
    "without_calls": "have tool calls, which the chat template leaves out: set another data.chat_template",
    "without_tools": "have tools, which the chat template does not look at: set another data.chat_template",
    "ended": "end with the end-of-sequence token, after which a model has nothing to write: check the chat template",
    "opened": "have begun the completion with a tag such as <think>: the built-in format rewards count it as part of the "
    "completion, other reward functions get it as `completion_prefixes`",
}
"""What a user should know about prompts, after "12 of 40 prompts"."""

DEFAULT_COLUMN = str(DataConfig.model_fields["prompt_column"].default)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenized prompt and the other columns of its row."""

    content: str | list[Message]
    """The entry of `prompts` for reward functions: the text, or the conversation with its system prompt."""
    token_ids: tuple[int, ...]
    """The model's input, including special tokens."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All other columns of the row; the same for every row, None where the source has no value."""
    eval_set: str | None = None
    """Name of the evaluation set that it belongs to; None if the sets have no names, and in training."""
    completion_prefix: str = ""
    """What the prompt has written of the assistant's text, from a tag on, such as `<think>`."""
    row: int = 0
    """Its place in the source, from 0."""
    is_from_reset: bool = False
    """Whether the row has no prompt, which `reset` of its environment returns: `content` then ends with an empty user turn."""

    def as_row(self, prompt_column: str) -> dict[str, Any]:
        """Its columns, with the prompt if the row has one."""
        return self.columns if self.is_from_reset else {**self.columns, prompt_column: self.content}


@dataclass(frozen=True, slots=True)
class PromptData:
    """The rows of a data set within the length limit, in their order, and what became of the others."""

    rows: list[Prompt]
    dropped: int
    """Number of longer prompts."""
    bad_rows: tuple[str, ...] = ()
    """Of the rows that `data.on_bad_row: drop` has dropped, the errors."""
    remarks: Mapping[str, int] = field(default_factory=dict)
    """The number of prompts of each kind in `REMARKS`."""

    @property
    def total(self) -> int:
        """Number of rows in the source."""
        return len(self.rows) + self.dropped + len(self.bad_rows)

    def counts(self) -> dict[str, Any]:
        """What became of the rows, as JSON data; of bad ones the first errors."""
        return {
            "prompts": len(self.rows),
            "too_long": self.dropped,
            "bad_rows": len(self.bad_rows),
            "errors": list(self.bad_rows[:_ERRORS_IN_SUMMARY]),
        }


def prepare_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig | None = None,
    *,
    max_prompt_length: int,
    vocab_size: int | None = None,
    tools: ToolsOfRow | None = None,
    has_environment: bool = False,
) -> PromptData:
    """Tokenize the prompts of `rows` and drop those of more than `max_prompt_length` tokens.

    A text is tokenized unchanged. A conversation goes through the chat template with the generation prompt added; if it ends
    with an assistant's message, that message is left open instead, for the model to continue. `config.system_prompt` is added
    to every prompt without a system message.

    Args:
        vocab_size: rows of the model's embedding; None: token ids are not checked.
        tools: of a run with tools or an environment: the schemas for a row, which are written into its conversation. Special
            tokens in its rows are encoded as text.
        has_environment: rows may have no prompt, or no column `prompt`: then `reset` of the environment returns it, as in TRL.

    Raises:
        ValueError: no rows; no such column; a conversation without a chat template, or one with a syntax error; a column with
            the name of an argument of reward functions; all prompts too long; and, unless `config.on_bad_row` is `drop`, a row
            whose prompt is empty, is neither text nor conversation, has content other than text, has no valid Unicode, is
            refused by the chat template, or has a token that the model does not know; with `tools` also a row whose prompt is a
            text, or that has a column `tools`.
    """
    rows, config = list(rows), config or DataConfig()
    if not rows:
        raise ValueError("the data set has no rows")
    column_names = list(dict.fromkeys(name for row in rows for name in row))
    if config.prompt_column in column_names:
        column_names.remove(config.prompt_column)
    elif not (has_environment and config.prompt_column == DEFAULT_COLUMN):
        raise ValueError(f"no column {config.prompt_column!r} for the prompt: set data.prompt_column to one of {column_names}")
    check_column_names(column_names)

    bad = _BadRows(config.on_bad_row == "stop")
    reader, drafts = _Reader(tokenizer, config, tools, has_environment), []
    for index, row in enumerate(rows):
        with bad.of_row(index):
            drafts.append(reader.read(row, index))
    kept, too_long = [], []
    for draft, ids in zip(drafts, reader.token_ids(drafts), strict=True):
        with bad.of_row(draft.row):
            _check_ids(ids, tokenizer, vocab_size)
            prompt = draft.prompt(ids, {name: rows[draft.row].get(name) for name in column_names})
            (kept if len(ids) <= max_prompt_length else too_long).append(prompt)
    if not kept:
        raise ValueError(_nothing_left(rows, too_long, bad.errors, max_prompt_length))
    remarks = Counter(remark for draft in drafts for remark in draft.remarks)
    remarks["ended"] = sum(prompt.token_ids[-1] == tokenizer.eos_token_id for prompt in kept)
    return PromptData(rows=kept, dropped=len(too_long), bad_rows=tuple(bad.errors), remarks=dict(+remarks))


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A prompt before it is tokenized. `text`: as rendered; `prefix`, `row` and `is_from_reset`: as in `Prompt`."""

    content: str | list[Message]
    text: str
    prefix: str
    row: int
    is_from_reset: bool
    remarks: tuple[str, ...]

    def prompt(self, token_ids: Sequence[int], columns: dict[str, Any]) -> Prompt:
        """The tokenized prompt, with the other columns of its row."""
        return Prompt(
            self.content,
            tuple(token_ids),
            columns,
            completion_prefix=self.prefix,
            row=self.row,
            is_from_reset=self.is_from_reset,
        )


class _Reader:
    """Reads the prompts of rows."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        config: DataConfig,
        tools: ToolsOfRow | None,
        has_environment: bool,
    ) -> None:
        self._tokenizer, self._config, self._tools, self._has_environment = tokenizer, config, tools, has_environment
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        tokens = [re.escape(token) for token in added if token.strip()]
        self._rendered = re.compile("|".join(tokens)) if tokens else None

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._config.chat_template_kwargs)

    @cached_property
    def _renderer(self) -> PromptRenderer:
        return PromptRenderer(self._tokenizer, self._config)

    def token_ids(self, drafts: Sequence[_Draft]) -> list[list[int]]:
        """The ids of all prompts, in their order."""
        if self._tools is None:
            return _token_ids(drafts, self._tokenizer)
        return self._renderer.guard.encode_each([draft.text for draft in drafts])

    def read(self, row: Mapping[str, Any], index: int) -> _Draft:
        """The prompt of a row.

        Raises:
            BadRowError: see `prepare_prompts`.
            ValueError: there is no chat template for a conversation, or it has a syntax error.
        """
        written = row.get(self._config.prompt_column)
        is_from_reset = written is None and self._has_environment
        prompt = [{"role": "user", "content": ""}] if is_from_reset else read_prompt(written)
        remarks = {"from_text": isinstance(written, str) and not isinstance(prompt, str)}
        if prompt == "":
            raise BadRowError("is empty: remove the row")
        messages = self._with_system_prompt(prompt)
        if messages is None and self._tools is not None:
            raise BadRowError(
                "is plain text, and tools and environments need conversations: write messages, or set data.system_prompt"
            )
        if messages is None:
            assert isinstance(prompt, str)
            rendered, content, last = Rendered(prompt), prompt, None
            remarks["plain"] = self._skips_template(prompt)
        else:
            tools = read_tools(row.get("tools"))
            rendered, content = self._render(messages, tools, row), messages
            last = messages[-1] if messages[-1]["role"] == "assistant" else None
            remarks |= {
                "continued": last is not None,
                "without_calls": rendered.loses_calls,
                "without_tools": tools is not None and not self._template.takes("tools"),
            }
        shown = rendered.text if self._tools is None else self._renderer.guard.show(rendered.text)
        _check_encodable(shown)
        prefix = self._prefix(shown, last)
        remarks["opened"] = bool(prefix)
        noted = tuple(remark for remark, is_so in remarks.items() if is_so)
        return _Draft(
            content=content, text=rendered.text, prefix=prefix, row=index, is_from_reset=is_from_reset, remarks=noted
        )

    def _render(self, messages: list[Message], tools: list[Any] | None, row: Mapping[str, Any]) -> Rendered:
        """The text of a conversation; `tools`: those of its column."""
        kwargs = read_template_kwargs(row.get("chat_template_kwargs"))
        if self._tools is None:
            return self._template.render(messages, tools=tools, kwargs=kwargs)
        if tools is not None:
            raise BadRowError(
                "has a column `tools`, whose calls nobody would answer in a run with tools or an environment: remove it, or "
                "rename it if it is for reward functions only"
            )
        return self._renderer.render(messages, self._tools(row), kwargs)

    def _with_system_prompt(self, prompt: str | list[Message]) -> list[Message] | None:
        """The conversation with the system prompt of the configuration; None: the prompt is a text and stays one."""
        text = self._config.system_prompt
        if isinstance(prompt, str):
            return None if text is None else [{"role": "system", "content": text}, {"role": "user", "content": prompt}]
        if text is None or prompt[0]["role"] == "system":
            return prompt
        return [{"role": "system", "content": text}, *prompt]

    def _skips_template(self, text: str) -> bool:
        """Whether there is a chat template, and the text was not rendered beforehand."""
        is_rendered = self._rendered is not None and self._rendered.search(text) is not None
        return bool(self._tokenizer.chat_template) and not is_rendered

    def _prefix(self, text: str, last: Message | None) -> str:
        """What a prompt has written of the completion, from a tag on; `last`: the message that the completion continues."""
        if last is not None:
            said = "".join(texts_of(last.get("content")))
            found = _FIRST_TAG.search(said)
            return said[found.start() :] if found else ""
        found = _LAST_TAG.search(text[-_LONGEST_LAST_TAG:])
        # Some templates end with a special token that looks like a tag; <think> may be one and is a tag nevertheless.
        if found is None or (found["tag"] in self._tokenizer.all_special_tokens and found["tag"] != "<think>"):
            return ""
        return found.group()


@dataclass
class _BadRows:
    """The errors of rows: the first one is raised, or all are collected."""

    stop: bool
    _by_row: dict[int, str] = field(default_factory=dict)

    @property
    def errors(self) -> list[str]:
        """In the order of the rows."""
        return [self._by_row[row] for row in sorted(self._by_row)]

    @contextmanager
    def of_row(self, row: int) -> Iterator[None]:
        """Inside the block, a `BadRowError` is about that row."""
        try:
            yield
        except BadRowError as error:
            message = f"the prompt of row {row} {error}"
            if self.stop:
                raise ValueError(f"{message} (data.on_bad_row=drop leaves such rows out)") from error
            self._by_row[row] = message


def _check_encodable(text: str) -> None:
    """Raise BadRowError for half of a surrogate pair, which JSON can hold and no tokenizer takes: an emoji was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"has half of a surrogate pair, {text[error.start]!a}, which is no character: remove it") from None


def _nothing_left(
    rows: Sequence[Mapping[str, Any]], too_long: Sequence[Prompt], errors: Sequence[str], max_prompt_length: int
) -> str:
    """The message for a data set without prompts."""
    longer = ""
    if too_long:
        shortest = min(len(prompt.token_ids) for prompt in too_long)
        longer = f"are longer than rollout.max_prompt_length={max_prompt_length}: the shortest has {shortest} tokens"
    if not errors:
        return f"all {len(rows)} prompts {longer}"
    if not too_long:
        return f"all {len(rows)} rows are bad: {errors[0]}"
    return f"no prompts are left: {len(too_long)} {longer}, and {len(errors)} are bad: {errors[0]}"


# ------------------------------------------------------------------------------------------------------------- tokens


def _token_ids(drafts: Sequence[_Draft], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of all prompts, in their order; one tokenizer call for texts and one for conversations, for speed."""
    token_ids: list[list[int]] = [[]] * len(drafts)
    for is_text in (True, False):
        places = [place for place, draft in enumerate(drafts) if isinstance(draft.content, str) is is_text]
        if not places:
            continue
        # The template adds the special tokens of a conversation, including BOS.
        encoded = tokenizer([drafts[place].text for place in places], add_special_tokens=is_text)["input_ids"]
        num_added = _num_added_at_end(tokenizer) if is_text else 0
        for place, ids in zip(places, encoded, strict=True):
            token_ids[place] = _one_bos(ids[: len(ids) - num_added], tokenizer) if is_text else ids
    return token_ids


def _num_added_at_end(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens, such as EOS, the tokenizer adds after every text: a prompt, which is continued, has none of them."""
    plain, complete = (tokenizer("a", add_special_tokens=is_complete)["input_ids"] for is_complete in (False, True))
    starts = range(len(complete) - len(plain) + 1)
    start = next((start for start in starts if complete[start : start + len(plain)] == plain), None)
    return 0 if start is None else len(complete) - start - len(plain)


def _one_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Remove the second BOS of a text that was rendered beforehand, to which the tokenizer adds another."""
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if doubled else ids


def _check_ids(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> None:
    """Raise BadRowError unless there are tokens, all of which the model's embedding has."""
    if not ids:
        raise BadRowError("is empty: remove the row")
    largest = max(ids)
    if vocab_size is not None and largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BadRowError(
            f"has the token {token!r} with the id {largest}, and the model's embedding has {vocab_size} rows: use the model's "
            "own tokenizer (model.tokenizer), or resize the embedding (model.resize_token_embeddings) and train the new rows "
            "first"
        )
