"""What sampling takes and what it returns. Everything downstream speaks of groups: one prompt and its G completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast


class EngineError(RuntimeError):
    """vLLM failed while it sampled; what it raised is the cause. The engine is not to be used any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer.

    `token_ids` end with the end-of-sequence token where the model stopped by itself. `text` is what the tokenizer decodes from
    them, without that token and special ones; with stop strings it ends before the first of these. `logprobs` are the
    sampler's, one a token, after temperature and the other sampling settings. `policy_version` counts publishes: it names the
    policy that drew every token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """One prompt and its completions. `index` is its place among the prompts that were handed to the engine."""

    index: int
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    def outline(self) -> PromptGroup:
        """The same group without its tokens and text: lengths, finish reasons and versions alone, for other workers."""
        return PromptGroup(
            index=self.index,
            prompt_token_ids=(),
            completions=tuple(
                Completion(
                    token_ids=cast(tuple[int, ...], range(len(c.token_ids))),  # has the length and takes no room
                    logprobs=(),
                    text="",
                    finish_reason=c.finish_reason,
                    policy_version=c.policy_version,
                )
                for c in self.completions
            ),
        )
