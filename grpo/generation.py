"""Completions of a user's prompts, with the current policy: what `GRPOTrainer.generate` does.

    texts = generate(lambda: session.engine, setup, ["2+3=", "4+4="], temperature=0.0, max_completion_length=None, seed=None)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from pydantic import ValidationError

from ..rollout.config import SamplingConfig
from ..rollout.engine import request_seed
from ..rollout.protocol import Engine
from .config import GRPOConfig
from .config.loading import describe_errors
from .config.run_config import known_keys
from .data.prompts import Prompt, prepare_prompts
from .episodes.dialogues import Dialogues
from .setup import RunSetup

UserPrompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: a list of messages with role and content."""


class SampledCompletion(TypedDict):
    """A completion with its tokens: what a `rollout_func` returns of it."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    text: str


def generate(
    current_engine: Callable[[], Engine],
    setup: RunSetup,
    prompts: UserPrompt | Sequence[UserPrompt],
    *,
    temperature: float | None,
    max_completion_length: int | None,
    seed: int | None,
) -> list[str]:
    """One completion of each prompt, in their order; with tools, complete episodes. See `GRPOTrainer.generate`.

    Args:
        current_engine: starts the engine if there is none, once everything is checked.

    Raises:
        ValueError: a prompt is neither text nor conversation, or too long; the engine cannot sample like this; the prompts
            would act in environments, which need complete rows.
    """
    config, episodes = setup.config, setup.episodes
    if isinstance(episodes, Dialogues) and episodes.has_environments:
        raise ValueError("generate: prompts of this run act in an environment, which gets complete rows: use evaluate")
    prepared = _prepared(setup, as_list(prompts))
    sampling = _sampling(config, temperature=temperature, longest=_longest(config, max_completion_length))
    seeds = None if seed is None else [request_seed(seed, 0, index) for index in range(len(prepared))]
    if not prepared:
        return []
    if isinstance(episodes, Dialogues):
        played = episodes.play(current_engine(), prepared, sampling, seeds=seeds)
        texts = {group.index: group.completions[0].text for group in played}
    else:
        groups = current_engine().rollout([prompt.token_ids for prompt in prepared], sampling, seeds=seeds)
        texts = {group.index: group.completions[0].text for group in groups}
    return [texts[index] for index in range(len(prepared))]


def sample(
    current_engine: Callable[[], Engine],
    setup: RunSetup,
    prompts: Sequence[UserPrompt | Sequence[int]],
    *,
    temperature: float | None,
    max_completion_length: int | None,
    seed: int | None,
) -> list[SampledCompletion]:
    """One completion of each prompt with its tokens. See `GRPOTrainer.generate_rollout_completions`.

    Raises:
        ValueError: as `generate`.
    """
    token_ids: list[tuple[int, ...]] = [tuple(one) if _is_ids(one) else () for one in prompts]  # type: ignore[arg-type]
    written = _prepared(setup, [one for one, ids in zip(prompts, token_ids, strict=True) if not ids])  # type: ignore[misc]
    texts = iter([prompt.token_ids for prompt in written])
    token_ids = [ids or next(texts) for ids in token_ids]
    _check_lengths(setup.config, token_ids)
    longest = _longest(setup.config, max_completion_length)
    sampling = _sampling(setup.config, temperature=temperature, longest=longest)
    seeds = None if seed is None else [request_seed(seed, 0, index) for index in range(len(token_ids))]
    if not token_ids:
        return []
    groups = sorted(current_engine().rollout(token_ids, sampling, seeds=seeds), key=lambda group: group.index)
    return [
        SampledCompletion(
            prompt_ids=list(group.prompt_token_ids),
            completion_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs),
            text=completion.text,
        )
        for group in groups
        for completion in group.completions
    ]


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(one, int) for one in prompt)


def _prepared(setup: RunSetup, prompts: Sequence[UserPrompt]) -> list[Prompt]:
    """The prompts, tokenized as in training.

    Raises:
        ValueError: one is neither text nor conversation, or too long.
    """
    config, inputs = setup.config, setup.inputs
    if not prompts:
        return []
    rows = [{config.data.prompt_column: prompt} for prompt in prompts]
    all_of_them = config.data.model_copy(update={"on_bad_row": "stop"})
    prepared = prepare_prompts(
        rows,
        inputs.tokenizer,
        all_of_them,
        max_prompt_length=sys.maxsize,
        vocab_size=inputs.vocab_size,
        tools=inputs.tools,
    )
    _check_lengths(config, [prompt.token_ids for prompt in prepared.rows])
    return prepared.rows


def _check_lengths(config: GRPOConfig, prompts: Sequence[Sequence[int]]) -> None:
    too_long = sum(len(ids) > config.rollout.max_prompt_length for ids in prompts)
    if too_long:
        raise ValueError(
            f"{too_long} of {len(prompts)} prompts are longer than rollout.max_prompt_length, which is "
            f"{config.rollout.max_prompt_length}: shorten them, or increase it"
        )


def _longest(config: GRPOConfig, max_completion_length: int | None) -> int:
    longest = config.rollout.max_completion_length if max_completion_length is None else max_completion_length
    if longest > config.rollout.max_completion_length:
        raise ValueError(
            f"max_completion_length: must be at most rollout.max_completion_length, which is "
            f"{config.rollout.max_completion_length} and determines the engine's context (got {longest})"
        )
    return longest


def _sampling(config: GRPOConfig, *, temperature: float | None, longest: int) -> SamplingConfig:
    """Sampling as in training apart from these arguments.

    Raises:
        ValueError: one of them is invalid, or the engine cannot sample like this.
    """
    try:
        sampling = config.rollout.as_in_training(1, temperature=temperature, max_completion_length=longest)
    except ValidationError as error:
        raise ValueError(describe_errors(error, known_keys())) from None
    config.rollout.check(sampling, section="")
    return sampling


def as_list(prompts: UserPrompt | Sequence[UserPrompt]) -> list[UserPrompt]:
    """The prompts; one alone, a text or a conversation, is a list of one."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not is_list or (len(prompts) > 0 and isinstance(prompts[0], Mapping)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
