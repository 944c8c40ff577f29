"""What a run reads before it starts: the model's folder, the tokenizer, prompts with their tools, and how they are sampled.

    user_inputs = UserInputs(tools=[add])
    prepared = prepare_inputs(config, user_inputs, load_actions(config, user_inputs), view=view)
    prepared.inputs.train_prompts, prepared.episodes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..rewards.config import RewardFunction, RewardsConfig
from ..rewards.loading import RewardSpec
from ..rewards.runner import Scorer
from .common.log import log_to
from .config import GRPOConfig, resolve_epochs
from .data.prompts import Prompt
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


def load_set_scorers(rewards: RewardsConfig, given: Mapping[str, Sequence[RewardSpec]] | None) -> dict[str, Scorer]:
    """The scorers of the evaluation sets that have functions of their own, by name. `given`: None: those of the configuration.

    Raises:
        ValueError, FileNotFoundError: see `Scorer`; the message names the set.
    """
    of_sets: Mapping[str, Sequence[RewardSpec | RewardFunction]] = rewards.eval_functions if given is None else given
    scorers = {}
    for name, functions in of_sets.items():
        try:
            scorers[name] = Scorer(rewards.of_eval_set(), functions)
        except ValueError as error:
            raise ValueError(f"the reward functions of the evaluation set {name!r}: {error}") from error
    return scorers


def check_eval_functions(
    prompts: Sequence[Prompt], scorer: Scorer, set_scorers: Mapping[str, Scorer], episodes: Episodes | None
) -> None:
    """Raise ValueError if an evaluation set has no reward functions, or they require what the data does not have."""
    for name in dict.fromkeys(prompt.eval_set for prompt in prompts):
        of_set = set_scorers.get(name or "", scorer)
        if not of_set.names and episodes is None:
            raise ValueError(f"the evaluation set {name!r} has no reward functions: add it to rewards.eval_functions")
        check_columns(of_set, prompts[0].columns, episodes)


def check_set_scorers(prompts: Sequence[Prompt], set_scorers: Mapping[str, Scorer]) -> None:
    """Raise ValueError if there are reward functions for an evaluation set that does not exist."""
    sets = dict.fromkeys(prompt.eval_set for prompt in prompts)
    if unknown := [name for name in set_scorers if name not in sets]:
        names = ", ".join(name for name in sets if name is not None) or "one set without a name: pass {name: data}"
        raise ValueError(f"reward functions of the evaluation set {unknown[0]!r}: there is no such set (there is {names})")


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
        if user_inputs.rollout_func is not None and config.rollout.routed_experts == "replay":
            raise ValueError(
                "rollout.routed_experts=replay: completions of a rollout_func come without the experts that vLLM chose: set "
                "compare or ignore"
            )
        episodes = make_episodes(actions, user_inputs.rollout_func, config, loaded)
    return PreparedInputs(
        config=resolve_epochs(config, rows=len(loaded.train_prompts.rows)),
        inputs=loaded,
        episodes=episodes,
        code_of_episodes={} if actions is None else actions.code,
        start_fingerprint=None if start is None else start.fingerprint,
    )
