"""Everything that a run needs before anything is started or written: checked configuration, data, reward functions.

    setup = prepare_run(config, UserInputs(reward_funcs=score), view=view)

`GRPOTrainer` and the workers of a cluster both begin with this; `loop.train(setup)` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..rewards.runner import Scorer
from .checkpoint.storage import Storage
from .checkpoint.store import CheckpointStore
from .common.interrupts import Interrupts
from .common.world import SINGLE_PROCESS, World
from .config import GRPOConfig
from .data.run_inputs import Prompt, RunInputs, with_template_text
from .data.sampler import PromptSampler
from .display.view import View
from .experience.user_functions import CODE, UserFunctions
from .prepared import (
    Episodes,
    check_columns,
    check_eval_functions,
    check_set_scorers,
    load_actions,
    load_set_scorers,
    prepare_inputs,
)
from .run.callbacks import Callbacks
from .user_inputs import UserInputs


@dataclass(kw_only=True)
class RunSetup:
    """See the module's docstring.

    Attributes:
        set_scorers: those of evaluation sets that have functions of their own, by name.
        start_fingerprint: hash of the adapter of `lora.start_from`, if it is set.
        functions: the user's functions on prompts and groups.
        episodes: how completions are sampled; None: each is one answer.
        code_of_episodes: hashes of the users' files with tools and environments.
        view: what shows the run; None on all workers but the main process.
        stop_requested: asked between steps, for requests that do not arrive as signals; one worker's answer stops all.
        on_ready: called once, when this worker's engine has started.
        last_checkpoint: the newest one that the run wrote or resumed from, once it has ended in whatever way.
        can_resume: whether the last run has left a checkpoint, on a cluster too.
    """

    config: GRPOConfig
    scorer: Scorer
    episodes: Episodes | None
    inputs: RunInputs
    callbacks: Callbacks
    functions: UserFunctions
    sampler: PromptSampler
    store: CheckpointStore
    storage: Storage | None
    view: View | None
    set_scorers: Mapping[str, Scorer] = field(default_factory=dict)
    code_of_episodes: Mapping[str, str] = field(default_factory=dict)
    start_fingerprint: str | None = None
    world: World = SINGLE_PROCESS
    interrupts: Interrupts = field(default_factory=Interrupts)
    stop_requested: Callable[[], bool] = lambda: False
    on_ready: Callable[[], None] = lambda: None
    last_checkpoint: Path | None = None
    can_resume: bool = False

    @property
    def eval_prompts(self) -> Sequence[Prompt] | None:
        """The evaluation data; None if the run has none."""
        return None if self.inputs.eval_prompts is None else self.inputs.eval_prompts.rows

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The run's inputs besides its configuration, to compare when it resumes."""
        start = {} if self.start_fingerprint is None else {"adapter of lora.start_from": self.start_fingerprint}
        of_sets = {name: list(scorer.names) for name, scorer in self.set_scorers.items()}
        names = {"reward functions": list(self.scorer.names), **({"reward functions of sets": of_sets} if of_sets else {})}
        code_of_sets = {path: digest for scorer in self.set_scorers.values() for path, digest in scorer.code.items()}
        code = {**code_of_sets, **self.scorer.code, **UserFunctions.code(self.config), **self.code_of_episodes}
        return {**self.inputs.fingerprint(), **names, CODE: code, **start}

    def stage(self, text: str) -> None:
        """Show the current phase of the run, outside of its steps."""
        if self.view is not None:
            self.view.stage(text)


def prepare_run(
    config: GRPOConfig,
    inputs: UserInputs,
    *,
    view: View | None,
    world: World = SINGLE_PROCESS,
    stop_requested: Callable[[], bool] = lambda: False,
    on_ready: Callable[[], None] = lambda: None,
) -> RunSetup:
    """Check and load all inputs of a run. Writes nothing.

    Raises:
        ValueError, FileNotFoundError: bad configuration, data or functions, with the remedy.
    """
    if view is None and world.is_main:
        raise ValueError("the main process needs a view: it records the run and shows it")
    config = with_template_text(config)
    logging = config.logging.model_copy(update={"working_dir": Path.cwd()})  # of the paths in the saved configuration
    config = config.model_copy(update={"logging": logging})
    actions = load_actions(config, inputs)
    set_scorers = load_set_scorers(config.rewards, inputs.eval_reward_funcs)
    only_evaluates = inputs.train_dataset is None and config.data.train is None
    scorer = Scorer(
        config.rewards,
        inputs.reward_funcs,
        needs_functions=(actions is None or not actions.rewards) and not (only_evaluates and set_scorers),
    )
    functions = UserFunctions.load(config)
    prepared = prepare_inputs(config, inputs, actions, view=view)
    config, prompts = prepared.config, prepared.inputs.train_prompts.rows
    check_columns(scorer, prompts[0].columns, prepared.episodes)
    if prepared.inputs.eval_prompts is not None:
        check_set_scorers(prepared.inputs.eval_prompts.rows, set_scorers)
        check_eval_functions(prepared.inputs.eval_prompts.rows, scorer, set_scorers, prepared.episodes)
    prepared.inputs.check_rows(scorer, set_scorers)
    run_dir, checkpoint = config.logging.output_dir, config.checkpoint
    return RunSetup(
        config=config,
        scorer=scorer,
        set_scorers=set_scorers,
        episodes=prepared.episodes,
        inputs=prepared.inputs,
        callbacks=Callbacks(inputs.callbacks, config, num_rows=len(prompts), world=world),
        functions=functions,
        sampler=PromptSampler(
            prompts,
            prompts_per_step=config.optim.prompts_per_step,
            seed=config.seed if config.data.shuffle_seed is None else config.data.shuffle_seed,
            shuffle=config.data.shuffle,
            function=functions.sampler,
        ),
        store=CheckpointStore(run_dir / "checkpoints", keep_last=checkpoint.keep_last, keep_best=checkpoint.keep_best),
        storage=None if checkpoint.storage is None else Storage(checkpoint.storage, run_dir),
        code_of_episodes=prepared.code_of_episodes,
        start_fingerprint=prepared.start_fingerprint,
        view=view,
        world=world,
        stop_requested=stop_requested,
        on_ready=on_ready,
    )
