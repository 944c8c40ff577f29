"""Completions of a user's prompts, with the current policy: what `GRPOTrainer.generate` does.

    texts = generate(lambda: session.engine, setup, ["2+3=", "4+4="], temperature=0.0, max_completion_length=None, seed=None)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ..rollout.config import SamplingConfig
from ..rollout.engine import request_seed
from ..rollout.protocol import Engine
from .config import GRPOConfig
from .config.loading import describe_errors
from .config.run_config import known_keys
from .data.prompts import prepare_prompts
from .setup import RunSetup

UserPrompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: a list of messages with role and content."""


def generate(
    current_engine: Callable[[], Engine],
    setup: RunSetup,
    prompts: UserPrompt | Sequence[UserPrompt],
    *,
    temperature: float | None,
    max_completion_length: int | None,
    seed: int | None,
) -> list[str]:
    """One completion of each prompt, in their order. See `GRPOTrainer.generate`.

    Args:
        current_engine: starts the engine if there is none, once everything is checked.

    Raises:
        ValueError: a prompt is neither text nor conversation, or too long; the engine cannot sample like this.
    """
    config = setup.config
    rows = [{config.data.prompt_column: prompt} for prompt in as_list(prompts)]
    if not rows:
        return []
    all_of_them = config.data.model_copy(update={"on_bad_row": "stop"})
    prepared = prepare_prompts(
        rows, setup.inputs.tokenizer, all_of_them, max_prompt_length=sys.maxsize, vocab_size=setup.inputs.vocab_size
    )
    too_long = sum(len(prompt.token_ids) > config.rollout.max_prompt_length for prompt in prepared.rows)
    if too_long:
        raise ValueError(
            f"{too_long} of {len(rows)} prompts are longer than rollout.max_prompt_length, which is "
            f"{config.rollout.max_prompt_length}: shorten them, or increase it"
        )
    longest = config.rollout.max_completion_length if max_completion_length is None else max_completion_length
    if longest > config.rollout.max_completion_length:
        raise ValueError(
            f"max_completion_length: must be at most rollout.max_completion_length, which is "
            f"{config.rollout.max_completion_length} and determines the engine's context (got {longest})"
        )
    sampling = _sampling(config, temperature=temperature, longest=longest)
    seeds = None if seed is None else [request_seed(seed, 0, index) for index in range(len(rows))]
    groups = current_engine().rollout([prompt.token_ids for prompt in prepared.rows], sampling, seeds=seeds)
    texts = {group.index: group.completions[0].text for group in groups}
    return [texts[index] for index in range(len(rows))]


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
