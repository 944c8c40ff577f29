"""From a conversation and a message to the tokens that an answer follows.

    prompter = Prompter(target, make_dialogues(target))
    prompter.prompt(history, "What is 12 + 30?", of="base").token_ids

Conversations go through the chat template of the run, with its variables and the schemas of its tools. Without a template a
message is a prompt of plain text, as in training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ....rollout.torch_engine import eos_token_ids
from ...data.messages import BadRowError, Message
from ...data.prompts import Prompt, prepare_prompts
from ...data.renderer import PromptRenderer
from ...episodes.actions import Actions
from ...episodes.dialogues import Dialogues
from .target import Target


class Prompter:
    """See the module's docstring."""

    def __init__(self, target: Target, dialogues: Dialogues | None) -> None:
        self._config, self._tokenizer = target.config, target.tokenizer
        self._is_text = target.text_reason is not None
        self._renderer = None if self._is_text else PromptRenderer(target.tokenizer, target.config.data)
        self._schemas = None if dialogues is None else dialogues.actions.all_schemas()

    def prompt(self, history: Sequence[Message], message: str, *, of: str) -> Prompt:
        """The prompt that a side answers. Of plain text, it is the message alone.

        Raises:
            ValueError: the conversation leaves no room for an answer, the chat template refuses it, or it is not valid text.
        """
        _check_encodable(message)
        if self._renderer is None:
            prompt = self._text_prompt(message)
        else:
            messages = [*history, {"role": "user", "content": message}]
            prompt = Prompt(messages, self._token_ids(messages))
        length, room = len(prompt.token_ids), self._config.rollout.max_model_length
        if length >= room:
            raise ValueError(
                f"the conversation of the {of} side has {length:,} tokens with this message, and the engine has room for "
                f"{room:,}, the answer included: /reset starts a new one, --context makes more room"
            )
        return prompt

    def check_system(self, text: str | None) -> None:
        """Raise ValueError if the chat template does not take this system prompt."""
        if text is not None:
            _check_encodable(text)
            self._token_ids([{"role": "system", "content": text}, {"role": "user", "content": "?"}])

    def _token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        assert self._renderer is not None
        try:
            return self._renderer.token_ids(messages, self._schemas)
        except BadRowError as error:
            raise ValueError(f"the conversation {error}") from error

    def _text_prompt(self, message: str) -> Prompt:
        data = self._config.data.model_copy(update={"on_bad_row": "stop"})
        row = {data.prompt_column: message}
        (prompt,) = prepare_prompts([row], self._tokenizer, data, max_prompt_length=sys.maxsize).rows
        return prompt


def make_dialogues(target: Target) -> Dialogues | None:
    """What plays episodes with the tools of the configuration; None if it has none.

    Raises:
        ValueError, FileNotFoundError: a tool cannot be loaded, or the chat template cannot write it.
    """
    actions = Actions.load(target.config)
    if actions is None:
        return None
    ends = eos_token_ids(target.model_path, target.tokenizer)
    return Dialogues(actions, target.config, target.tokenizer, eos_token_ids=ends)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the message is not valid UTF-8") from None
