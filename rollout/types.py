"""What sampling returns: groups, each one prompt and its G completions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


class EngineError(RuntimeError):
    """vLLM failed while sampling; its exception is the cause. The engine cannot be used any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer, or on a worker that did not sample it its metadata, without tokens, log-probabilities and text.

    Attributes:
        token_ids: the sampled tokens, including the end-of-sequence token if the model ended the completion.
        logprobs: the sampler's log-probability of each token, after temperature and the other sampling options.
        text: `token_ids` decoded, without special tokens (unless `skip_special_tokens` is false), and without the token or the
            stop string that ended the completion (unless `include_stop_str_in_output` is true).
        policy_version: number of publishes before sampling: it identifies the policy.
        omitted_tokens: tokens that this object does not hold: all of them in metadata, otherwise none.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    policy_version: int
    omitted_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the completion, held here or not."""
        return len(self.token_ids) + self.omitted_tokens

    def metadata(self) -> Completion:
        """The length, finish reason and policy version alone."""
        return replace(self, token_ids=(), logprobs=(), text="", omitted_tokens=self.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """One prompt and its completions. `index` is the prompt's position in the list passed to the engine."""

    index: int
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    def metadata(self) -> PromptGroup:
        """The group without tokens and text, as other workers need it."""
        return replace(self, prompt_token_ids=(), completions=tuple(c.metadata() for c in self.completions))
