"""The episodes of a run, from what the user passes and what is loaded.

    episodes = make_episodes(actions, rollout_func, config, inputs)         # None: a completion is one answer to one prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import GRPOConfig
from ..data.run_inputs import RunInputs
from .actions import Actions
from .dialogues import Dialogues
from .groups import Episodes
from .rollout_func import UserRollouts

__all__ = ["Actions", "Episodes", "make_episodes"]


def make_episodes(
    actions: Actions | None,
    rollout_func: Callable[[list[Any]], Mapping[str, Any]] | None,
    config: GRPOConfig,
    inputs: RunInputs,
) -> Episodes | None:
    """See the module's docstring.

    Raises:
        ValueError: both are set; the chat template cannot write the tools; a row names no environment, or lacks a column that
            its `reset` needs.
    """
    if rollout_func is not None:
        if actions is not None:
            raise ValueError("rollout_func: samples everything itself: leave out tools and environments, or call them in it")
        if config.cluster.workers > 1:
            raise ValueError("rollout_func: gets the trainer, which workers of a cluster do not have: set cluster.workers=1")
        return UserRollouts(rollout_func, inputs.tokenizer, inputs.vocab_size, config.rollout.max_model_length)
    if actions is None:
        return None
    for prompts in (inputs.train_prompts, inputs.eval_prompts):
        if prompts is not None and actions.environments is not None:
            for prompt in prompts.rows:
                actions.environments.check_row(prompt.as_row(config.data.prompt_column))
    from ...rollout.torch_engine import eos_token_ids

    ends = eos_token_ids(inputs.model_path, inputs.tokenizer)
    return Dialogues(actions, config, inputs.tokenizer, eos_token_ids=ends, num_workers=config.cluster.workers)
