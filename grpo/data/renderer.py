"""The prompts of a run with tools or an environment, from messages to token ids.

    renderer = PromptRenderer(tokenizer, config.data)
    renderer.token_ids(messages, tools=schemas)

`prepare_prompts` uses it for rows, and an episode whose environment changes the prompt uses it for that prompt. Special tokens
in messages and schemas are encoded as text, except in the assistant's messages, whose markers may be such tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import DataConfig
from .hermes import Schema, ToolTemplate
from .messages import Message
from .special_tokens import SpecialTokenGuard
from .templates import ChatTemplate, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptRenderer:
    """See the module's docstring.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.template = ToolTemplate(ChatTemplate(tokenizer, config.chat_template_kwargs))
        self.guard = SpecialTokenGuard(tokenizer)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Schema] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> Rendered:
        """The text of a conversation, in which the special tokens of messages and schemas are marked for `guard.encode`.

        Raises:
            BadRowError: the template refuses the conversation, or leaves out messages.
        """
        hidden = [self._hidden(message) for message in messages]
        return self.template.render(hidden, tools=self.guard.hide_all(list(tools or ())), kwargs=kwargs)

    def token_ids(
        self, messages: Sequence[Message], tools: Sequence[Schema] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """The ids of a prompt; `kwargs`: the row's `chat_template_kwargs`.

        Raises:
            BadRowError: as in `render`.
        """
        return tuple(self.guard.encode(self.render(messages, tools, kwargs).text))

    def _hidden(self, message: Message) -> Message:
        if message["role"] == "assistant":
            return message
        return {**message, "content": self.guard.hide_all(message.get("content"))}
