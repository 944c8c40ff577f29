"""What a run reads before it starts: the model's folder, the tokenizer, prompts with their tools, and how they are sampled.

    user_inputs = UserInputs(tools=[add])
    prepared = prepare_inputs(config, user_inputs, load_actions(config, user_inputs), view=view)
    prepared.inputs.train_prompts, prepared.episodes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..rewards.runner import Scorer
from .common.log import log_to
from .config import GRPOConfig, resolve_epochs
from .data.run_inputs import RunInputs, load_run_inputs
from .display.view import View
from .episodes.make import Actions, Episodes, make_episodes
from .update.resolve import resolve_training
from .user_inputs import UserInputs

__all__ = ["Episodes", "PreparedInputs", "check_columns", "load_actions", "prepare_inputs"]


@dataclass(frozen=True, kw_only=True)
class PreparedInputs:
    """See the module's docstring.

    Attributes:
        config: with what depends on model and data, such as the number of steps of a run in epochs.
        episodes: None: a completion is one answer to one prompt.
        code_of_episodes: hashes of the users' files with tools and environments.
        start_fingerprint: hash of the adapter of `lora.start_from`, if it is set.
    """

    config: GRPOConfig
    inputs: RunInputs
    episodes: Episodes | None
    code_of_episodes: Mapping[str, str] = field(default_factory=dict)
    start_fingerprint: str | None = None


def load_actions(config: GRPOConfig, inputs: UserInputs) -> Actions | None:
    """The tools and environments of a run; None if it has neither.

    Raises:
        ValueError, FileNotFoundError: see `Actions.load`.
    """
    return Actions.load(config, tools=inputs.tools, environments=inputs.environment_factory)


def check_columns(scorer: Scorer, columns: Iterable[str], episodes: Episodes | None) -> None:
    """Raise ValueError if a reward function requires what a run with these columns of its data does not have."""
    if episodes is None or not episodes.adds_columns:
        scorer.check_columns(columns, has_environments=episodes is not None and episodes.shows_environments)


def prepare_inputs(
    config: GRPOConfig, user_inputs: UserInputs, actions: Actions | None, *, view: View | None
) -> PreparedInputs:
    """Load the inputs of a run, and prove that its chat template can write its tools and turns. Writes nothing.

    Raises:
        ValueError, FileNotFoundError: bad data, no such model, a chat template that does not do.
    """
    with log_to(lambda text: None if view is None else view.stage(text)):
        train_dataset, tools, has_environment = user_inputs.train_dataset, None, False
        if actions is not None:
            tools, has_environment = actions.schemas, actions.environments is not None
            if train_dataset is None and config.data.train is None:
                train_dataset = actions.rows_without_data(config)
        loaded = load_run_inputs(
            config, train_dataset, user_inputs.eval_dataset, tools, has_environment=has_environment
        )
        config, start = resolve_training(config, loaded.model_path, loaded.tokenizer)
        episodes = make_episodes(actions, user_inputs.rollout_func, config, loaded)
    return PreparedInputs(
        config=resolve_epochs(config, rows=len(loaded.train_prompts.rows)),
        inputs=loaded,
        episodes=episodes,
        code_of_episodes={} if actions is None else actions.code,
        start_fingerprint=None if start is None else start.fingerprint,
    )
