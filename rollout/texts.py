"""From the tokens of a completion to the text that reward functions see, and the stop strings that end it; for both engines.

    texts = Texts(tokenizer, sampling)
    texts.stop_token_ids                            # stop strings that are special tokens: no decoded text contains them
    texts.ended_by_token([5, 6, 2])                 # decoded without the token that ended it
    texts.decode([5, 6])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from .config import SamplingConfig


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that decoding leaves out, with their ids: end of sequence, padding, and those added as special ones."""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def check_stop_strings(sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether each stop string can end a completion.

    Raises:
        ValueError: one has a special token in it, which the decoded text has not.
    """
    if not sampling.skip_special_tokens:
        return
    special = special_tokens(tokenizer)
    for string in sampling.stop:
        inside = [token for token in special if token in string]
        if inside and string not in special:
            raise ValueError(
                f"rollout.stop: {string!r} has the special token {inside[0]!r} in it, which is left out of the text, so it "
                f"would never be found: stop at {inside[0]!r} alone, or set rollout.skip_special_tokens=false"
            )


class Texts:
    """See the module's docstring.

    Attributes:
        stop_strings: those that the text is searched for.
        stop_token_ids: tokens that end a completion besides those of the model: stop strings that are one special token, and
            `generation_kwargs.stop_token_ids`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        special = special_tokens(tokenizer) if sampling.stop else {}
        self._stop_tokens = {special[string]: string for string in sampling.stop if string in special}
        # Also those that are special tokens: a model may spell them out.
        self.stop_strings: Sequence[str] = sampling.stop
        self.stop_token_ids = [*dict.fromkeys([*self._stop_tokens, *sampling.generation_kwargs.stop_token_ids])]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, with or without the special ones among them."""
        skip = self._sampling.skip_special_tokens
        return cast(str, self._tokenizer.decode(list(token_ids), skip_special_tokens=skip))

    def ended_by_token(self, token_ids: Sequence[int]) -> str:
        """The text of a completion whose last token ended it. That token is not part of it, special or not, unless
        `include_stop_str_in_output` is set; then a stop string is, even if it is a special token."""
        if not self._sampling.include_stop_str_in_output:
            return self.decode(token_ids[:-1])
        if self.stop_strings and (cut_off := self.first_stop(token_ids)) is not None:  # part of a special token in the text
            return cut_off
        if self._sampling.skip_special_tokens and token_ids[-1] in self._stop_tokens:
            return self.decode(token_ids[:-1]) + self._stop_tokens[token_ids[-1]]
        return self.decode(token_ids)

    def ended_by_string(self, token_ids: Sequence[int], string: str) -> str | None:
        """The text up to this stop string, which the last token completed; None if it is not there."""
        text, before = self.decode(token_ids), self.decode(token_ids[:-1])
        # What the last token changed: also a character of which the tokens before it have the first bytes.
        pairs = enumerate(zip(before, text, strict=False))
        changed = next((place for place, (old, new) in pairs if old != new), min(len(before), len(text)))
        at = text.find(string, max(0, changed - len(string) + 1))
        return None if at < 0 else self._cut(text, at, string)

    def first_stop(self, token_ids: Sequence[int]) -> str | None:
        """The text up to the first stop string; None if it has none. The one that is complete first counts, as with vLLM; of
        several, the first that is listed."""
        text = self.decode(token_ids)
        found = [
            (at + len(string), place, at) for place, string in enumerate(self.stop_strings) if (at := text.find(string)) >= 0
        ]
        if not found:
            return None
        _, place, at = min(found)
        return self._cut(text, at, self.stop_strings[place])

    def _cut(self, text: str, at: int, string: str) -> str:
        return text[: at + len(string)] if self._sampling.include_stop_str_in_output else text[:at]
