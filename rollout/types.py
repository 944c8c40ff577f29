"""What sampling returns: groups, each one prompt and its G completions.

A completion may be an episode of several turns. Then some of its tokens were given and not sampled: results of tools, a
user's turn, the chat template's text between turns. `Completion.given` tells which. Only sampled tokens have log-probabilities,
and only they become targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Span = tuple[int, int]
"""A half-open range of places in `Completion.token_ids`."""

FinishReason = Literal["stop", "length", "abort", "turns", "done", "failed"]
"""Why a completion ended: the model ended it (`stop`); no room was left for tokens, or for a result (`length`); the engine
aborted it; the limit of turns, with a pending call (`turns`); its environment ended it (`done`), or failed (`failed`)."""

CallError = Literal["raised", "unknown", "arguments", "malformed", "timeout"]
"""Why a tool gave no result: it raised; there is no such tool; its arguments are wrong; the call does not parse; time limit."""


class EngineError(RuntimeError):
    """vLLM failed while sampling; its exception is the cause. The engine cannot be used any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallRecord:
    """One call of a tool: the arguments as the model wrote them, what it was answered, and how long that took.

    `name` and `arguments` are None where the call does not parse that far; `error` is None if the tool returned.
    """

    name: str | None
    arguments: Any
    result: str
    seconds: float
    error: CallError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What happened in a completion that could have several turns.

    Attributes:
        messages: those behind the prompt: the assistant's, results of tools (role `tool`), turns of the environment.
        turns: number of the assistant's turns.
        calls: of tools, in the order in which the model made them.
        seconds_waiting: from calls to their results, summed over the turns; other episodes are sampled meanwhile.
        rewards: what the environment's `get_reward` returned, by name; None: not scored. Empty if it has no such method.
        recomputed_tokens: computed again for a later turn, as the engine no longer had their keys and values.
        failure: why it is void, with the traceback; None: it is not.
    """

    messages: tuple[Mapping[str, Any], ...]
    turns: int
    calls: tuple[ToolCallRecord, ...] = ()
    seconds_waiting: float = 0.0
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    recomputed_tokens: int = 0
    failure: str | None = None

    def metadata(self) -> Episode:
        """Its numbers, without texts."""
        calls = tuple(replace(call, name=None, arguments=None, result="") for call in self.calls)
        return replace(self, messages=(), calls=calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer or episode, or on a worker that did not sample it its metadata, without tokens, log-probabilities and
    text.

    Attributes:
        token_ids: all tokens behind the prompt, including the end-of-sequence token if the model ended the completion.
        logprobs: the sampler's log-probability of each sampled token, after temperature and the other sampling options.
        text: `token_ids` decoded, without special tokens (unless `skip_special_tokens` is false), and without the token or the
            stop string that ended the completion (unless `include_stop_str_in_output` is true).
        policy_version: number of publishes before sampling: it identifies the policy.
        given: the ranges of `token_ids` that were given, ascending and not adjacent; all others were sampled.
        episode: its messages and calls, if it could have several turns.
        omitted_tokens: sampled tokens that this object does not hold: all of them in metadata, otherwise none.
        omitted_given: the same for given tokens.
        routed_experts: the experts that the engine chose, [prompt + tokens - 1, layers, top_k], uint8 or uint16: for each token
            of the prompt and of the completion, except the last sampled token, which is no input. Zeros in layers without
            experts. None: the engine was not asked, or cannot tell.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int
    given: tuple[Span, ...] = ()
    episode: Episode | None = None
    omitted_tokens: int = 0
    omitted_given: int = 0
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the completion, held here or not: its length in losses, penalties and metrics."""
        return len(self.logprobs) + self.omitted_tokens

    @property
    def num_given(self) -> int:
        """Given tokens, held here or not. With `num_tokens` they are its length in budgets."""
        return len(self.token_ids) - len(self.logprobs) + self.omitted_given

    @property
    def sampled(self) -> list[int]:
        """The places of its sampled tokens in `token_ids`."""
        return sampled_places(len(self.token_ids), self.given)

    @property
    def spans(self) -> list[Span]:
        """The ranges of `token_ids` that were sampled."""
        ends = [end for _, end in self.given]
        starts = [start for start, _ in self.given]
        return [(a, b) for a, b in zip([0, *ends], [*starts, len(self.token_ids)], strict=True) if a < b]

    @property
    def is_truncated(self) -> bool:
        """Whether a limit of tokens or turns cut it off."""
        return self.finish_reason in ("length", "turns")

    @property
    def is_void(self) -> bool:
        """Whether it is an episode whose environment failed: it has no reward, and nothing of it is trained."""
        return self.episode is not None and self.episode.failure is not None

    def metadata(self, *, with_text: bool = False) -> Completion:
        """The lengths, finish reason and policy version alone, and the numbers of the episode; if asked for, the text too."""
        return replace(
            self,
            token_ids=(),
            logprobs=(),
            text=self.text if with_text else "",
            given=(),
            episode=None if self.episode is None else self.episode.metadata(),
            routed_experts=None,
            omitted_tokens=self.num_tokens,
            omitted_given=self.num_given,
        )


def sampled_places(length: int, given: Sequence[Span]) -> list[int]:
    """The places below `length` that are in none of the ranges."""
    places: list[int] = []
    start = 0
    for first, end in given:
        places += range(start, first)
        start = end
    return [*places, *range(start, length)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """One prompt and its completions. `index` is the prompt's position in the list passed to the engine."""

    index: int
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    def metadata(self) -> PromptGroup:
        """The group without tokens and text, as other workers need it."""
        return replace(self, prompt_token_ids=(), completions=tuple(c.metadata() for c in self.completions))
