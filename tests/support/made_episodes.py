"""Episodes as an environment could have played them, made up: messages, calls, given tokens, rewards.

    episode = played(turns=2, calls=[call("add")], rewards={"Guess": 1.0})
    completion = completion_of(episode, sampled=5, given=3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt
from rankup.rollout.types import CallError, Completion, Episode, FinishReason, ToolCallRecord

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 741, "b": 295}}}
DIALOGUE: tuple[Mapping[str, Any], ...] = (
    {"role": "assistant", "content": "I add.", "tool_calls": [ADD]},
    {"role": "tool", "name": "add", "content": "1036"},
    {"role": "assistant", "content": "It is 1036."},
)
TRACEBACK = 'Traceback (most recent call last):\n  File "world.py", line 3, in reset\nConnectionError: the server is gone'


def call(name: str | None = "add", *, error: CallError | None = None, seconds: float = 0.5) -> ToolCallRecord:
    return ToolCallRecord(name=name, arguments={"a": 741, "b": 295}, result="1036", seconds=seconds, error=error)


def played(
    *,
    messages: Sequence[Mapping[str, Any]] = DIALOGUE,
    turns: int = 2,
    calls: Sequence[ToolCallRecord] = (),
    rewards: Mapping[str, float | None] | None = None,
    seconds: float = 0.0,
    recomputed: int = 0,
) -> Episode:
    return Episode(
        messages=tuple(messages),
        turns=turns,
        calls=tuple(calls),
        rewards=dict(rewards or {}),
        seconds_waiting=seconds,
        recomputed_tokens=recomputed,
    )


VOID = Episode(messages=DIALOGUE[:1], turns=1, failure=TRACEBACK)


def completion_of(
    episode: Episode | None = None,
    *,
    sampled: int = 4,
    given: int = 2,
    reason: FinishReason = "stop",
    text: str = "It is 1036.",
) -> Completion:
    """Its first token was sampled, the given ones follow, then come the other sampled ones."""
    if episode is not None and episode.failure is not None:
        reason = "failed"
    return Completion(
        token_ids=tuple(range(10, 10 + sampled + given)),
        logprobs=(-1.0,) * sampled,
        text=text,
        finish_reason=reason,
        policy_version=3,
        given=((1, 1 + given),) if given else (),
        episode=episode,
    )


def prompt_of(text: str = "What is 741 + 295?", **columns: Any) -> Prompt:
    """A conversation."""
    return Prompt(content=[{"role": "user", "content": text}], token_ids=(5, 6), columns=columns)


def group_of(*completions: Completion, prompt: Prompt | None = None, **changes: Any) -> Group:
    return Group(prompt=prompt_of() if prompt is None else prompt, completions=completions, **changes)
