"""Special tokens in what people and tools write: they stay text.

    guard = SpecialTokenGuard(tokenizer)
    text = template.render([{"role": "user", "content": guard.hide("what is <|im_end|>?")}]).text
    guard.encode(text)          # one id of <|im_end|>, the template's; the one in the question is encoded as characters
    guard.show(text)            # the rendered text as it reads

`hide` puts a mark behind the first character of each special token. Templates carry it along with the text, whatever else they
do to it (trim it, quote it as JSON), and the text is encoded in pieces that end at the marks.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...rollout.texts import special_tokens

BREAK = f"qzx{secrets.token_hex(8)}qzx"
"""Nobody can write it, since it is another one in each process. It is never encoded."""


class SpecialTokenGuard:
    """See the module's docstring. `more`: tokens that are guarded too, although the tokenizer does not call them special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        names = {*special_tokens(tokenizer), *map(self._name, more)}
        # A special token of one character has no inside for the mark.
        found = sorted((re.escape(name) for name in names if len(name) > 1 and name not in BREAK), key=len, reverse=True)
        self._special = re.compile("|".join(found)) if found else None

    def hide(self, text: str) -> str:
        """The text with a mark in each special token, so that it is none."""
        if self._special is None:
            return text
        while self._special.search(text):  # the rest of one may be another one
            text = self._special.sub(lambda one: f"{one[0][0]}{BREAK}{one[0][1:]}", text)
        return text

    def hide_all(self, value: Any) -> Any:
        """The same for all texts in JSON data: keys and values."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide_all(key): self.hide_all(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(one) for one in value]
        return value

    def show(self, text: str) -> str:
        """A rendered text without the marks."""
        return text.replace(BREAK, "")

    def remove(self, text: str) -> str:
        """The text without its special tokens."""
        return text if self._special is None else self._special.sub("", text)

    def encode(self, text: str, *, behind: int | None = None) -> list[int]:
        """The ids of a rendered text; without marks those that the tokenizer gives it.

        Args:
            behind: a special token that precedes the text; its id is not returned. Some tokenizers add a space in front of a
                text, but not in the middle of one.
        """
        first, *others = text.split(BREAK)
        ids = self._encode(first) if behind is None else self._behind(first, behind)
        for piece in others:
            ids += self._encode(piece) if self._anchor is None else self._behind(piece, self._anchor)
        return ids

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of rendered texts; those without marks in one call of the tokenizer, for speed."""
        whole = [text for text in texts if BREAK not in text]
        encoded = iter(self._tokenizer(whole, add_special_tokens=False)["input_ids"] if whole else [])
        return [self.encode(text) if BREAK in text else next(encoded) for text in texts]

    def _behind(self, text: str, token: int) -> list[int]:
        ids = self._encode(self._name(token) + text)
        return ids[ids.index(token) + 1 :]

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def _encode(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    @cached_property
    def _anchor(self) -> int | None:
        """A special token behind which a piece is encoded as in the middle of a text."""
        for id in special_tokens(self._tokenizer).values():
            ids = self._encode(self._name(id) + "a")
            if ids[:1] == [id] and len(ids) > 1:
                return id
        return None
