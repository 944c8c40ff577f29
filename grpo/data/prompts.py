"""From rows to tokenized prompts.

    data = prepare_prompts(rows, tokenizer, max_prompt_length=512)
    data.rows[0].token_ids, data.dropped

A prompt is a text, which is tokenized unchanged, or a conversation (a list of {"role", "content"}), which is rendered by the
tokenizer's chat template. A system prompt turns a text into a conversation. All other columns go to the reward functions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2

from ...rewards.runner import check_column_names
from ..common.errors import first_line
from ..config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


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
    row: int = 0
    """Its place in the source, from 0."""


@dataclass(frozen=True, slots=True)
class PromptData:
    """The rows of a data set within the length limit, in their order, and the number of longer ones."""

    rows: list[Prompt]
    dropped: int


def prepare_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig | None = None,
    *,
    max_prompt_length: int,
) -> PromptData:
    """Tokenize the prompts of `rows` and drop those of more than `max_prompt_length` tokens.

    A text is tokenized unchanged. A conversation goes through the chat template with the generation prompt added; if it ends
    with an assistant's message, that message is left open instead, for the model to continue. `config.system_prompt` is added
    to every prompt without a system message.

    Raises:
        ValueError: no rows; no such column; an empty prompt, or one that is neither text nor conversation; a conversation
            without a chat template, or one that raises an error in the template; a column with the name of an argument of
            reward functions; all prompts too long.
    """
    rows, config = list(rows), config or DataConfig()
    if not rows:
        raise ValueError("the data set has no rows")
    column_names = list(dict.fromkeys(name for row in rows for name in row))
    if config.prompt_column not in column_names:
        raise ValueError(f"no column {config.prompt_column!r} for the prompt: set data.prompt_column to one of {column_names}")
    column_names.remove(config.prompt_column)
    check_column_names(column_names)

    prompts = [_as_prompt(row.get(config.prompt_column), index, config.system_prompt) for index, row in enumerate(rows)]
    token_ids = _tokenize(prompts, tokenizer, config.chat_template_kwargs)
    for index, ids in enumerate(token_ids):
        if not ids:
            raise ValueError(f"the prompt of row {index} is empty: remove the row")
    kept = [
        Prompt(prompt, tuple(ids), {name: row.get(name) for name in column_names}, row=index)
        for index, (prompt, ids, row) in enumerate(zip(prompts, token_ids, rows, strict=True))
        if len(ids) <= max_prompt_length
    ]
    if not kept:
        raise ValueError(
            f"all {len(rows)} prompts are longer than rollout.max_prompt_length={max_prompt_length}: the shortest has "
            f"{min(map(len, token_ids))} tokens"
        )
    return PromptData(rows=kept, dropped=len(rows) - len(kept))


def _as_prompt(prompt: Any, index: int, system_prompt: str | None) -> str | list[Message]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    if isinstance(prompt, str):
        return [*system, {"role": "user", "content": prompt}] if system else prompt
    is_conversation = isinstance(prompt, Sequence) and all(
        isinstance(message, Mapping) and "role" in message and "content" in message for message in prompt
    )
    if not is_conversation or not prompt:
        raise ValueError(
            f"the prompt of row {index} is neither a text nor a conversation (a list of mappings with role and "
            f"content): {repr(prompt)[:80]}"
        )
    # Arrow adds the keys of all messages to every message, as None, but templates test whether a key exists.
    messages = [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in prompt
    ]
    return messages if messages[0]["role"] == "system" else [*system, *messages]


def _tokenize(
    prompts: Sequence[str | list[Message]], tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any]
) -> list[list[int]]:
    """Token ids of all prompts, in their order; one tokenizer call for texts and one for conversations, for speed."""
    token_ids: list[list[int]] = [[]] * len(prompts)
    for is_text in (True, False):
        places = [place for place, prompt in enumerate(prompts) if isinstance(prompt, str) is is_text]
        if not places:
            continue
        texts = [_render(prompts[place], tokenizer, template_kwargs) for place in places]
        # The template adds the special tokens of a conversation, including BOS.
        encoded = tokenizer(texts, add_special_tokens=is_text)["input_ids"]
        for place, ids in zip(places, encoded, strict=True):
            token_ids[place] = _one_bos(ids, tokenizer) if is_text else ids
    return token_ids


def _one_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Remove the second BOS of a text that was rendered beforehand, to which the tokenizer adds another."""
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if doubled else ids


def _render(
    prompt: str | list[Message], tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any]
) -> str:
    """A text, or a conversation in the chat template."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are conversations, but the model's tokenizer has no chat template: use an instruction-tuned "
            "model, or plain-text prompts without data.system_prompt"
        )
    is_open = prompt[-1]["role"] == "assistant"
    try:
        rendered: Any = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=not is_open, continue_final_message=is_open, **template_kwargs
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template failed for a prompt: {first_line(error)}") from error
    return rendered
