"""The answers to a message, one of each side, sampled in the same steps of the engine.

    answers = sampled_answers(sampler, prompts, sampling, None, [False, True], context=4096)
    answers = played_answers(dialogues, sampler, prompts, sampling, None, [False, True])        # with the tools of the run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....rollout.config import SamplingConfig
from ....rollout.protocol import TurnSampler
from ....rollout.turns import Request
from ....rollout.types import FinishReason
from ...data.messages import Message
from ...data.prompts import Prompt
from ...episodes.dialogues import Dialogues


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a side answered.

    Attributes:
        text: of its last turn; empty if that has no text but calls.
        messages: that it adds to the conversation: of an episode also calls and results.
        num_tokens: number of sampled tokens.
    """

    text: str
    messages: tuple[Message, ...]
    finish_reason: FinishReason
    num_tokens: int


def sampled_answers(
    sampler: TurnSampler,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int | None,
    uses_adapter: Sequence[bool],
    *,
    context: int,
) -> list[Answer]:
    """One turn behind each prompt.

    Args:
        seed: of all sides; None: not reproducible.
        uses_adapter: of each side.
        context: tokens of prompt and answer at most.
    """
    turns = {}
    with sampler.requests(sampling) as requests:
        for key, prompt in enumerate(prompts):
            room = context - len(prompt.token_ids)
            request = Request(
                prompt_token_ids=prompt.token_ids,
                max_tokens=min(sampling.max_completion_length, room),
                seed=seed,
                group=key,
                use_adapter=uses_adapter[key],
            )
            requests.submit(key, request)
        while requests.has_unfinished:
            turns.update(requests.step())
    return [
        Answer(
            text=turn.text,
            messages=({"role": "assistant", "content": turn.text},),
            finish_reason=turn.finish_reason,
            num_tokens=len(turn.token_ids),
        )
        for _, turn in sorted(turns.items())
    ]


def played_answers(
    dialogues: Dialogues,
    sampler: TurnSampler,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int | None,
    uses_adapter: Sequence[bool],
) -> list[Answer]:
    """An episode behind each prompt. The arguments are those of `sampled_answers`."""
    seeds = None if seed is None else [seed] * len(prompts)
    answers = {}
    for group in dialogues.play(sampler, prompts, sampling, seeds=seeds, use_adapter=uses_adapter):
        (completion,) = group.completions
        assert completion.episode is not None
        messages = tuple(dict(message) for message in completion.episode.messages)
        last: Message = messages[-1] if messages else {}
        is_text = last.get("role") == "assistant" and not last.get("tool_calls")
        answers[group.index] = Answer(
            text=str(last.get("content") or "") if is_text else "",
            messages=messages,
            finish_reason=completion.finish_reason,
            num_tokens=completion.num_tokens,
        )
        group.release()
    return [answers[index] for index in range(len(prompts))]
