"""The public trainer.

    from rankup import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(model="smollm2-135m-instruct", reward_funcs=my_reward, args=GRPOConfig(max_steps=50),
                          train_dataset="train.jsonl", eval_dataset="test.jsonl")
    summary = trainer.train()                                   # or train(resume_from_checkpoint=True)

Making a `GRPOTrainer` checks configuration, data and reward functions and writes nothing; `train` makes the run folder. The
loop itself is in `loop.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerState

from ..rewards.loading import RewardSpec
from ..rollout.engine import RolloutEngine
from . import loop
from .checkpoint.resume import Resume
from .common.errors import ClusterError
from .common.log import log_to
from .config import GRPOConfig
from .context import open_scorer_and_session
from .data.sources import DataSource
from .display.terminal import View, make_view
from .experience.evaluation import evaluate
from .setup import prepare_run
from .user_inputs import UserInputs


class GRPOTrainer:
    """Trains one LoRA adapter with GRPO. See the module's docstring.

    Args:
        model: embedded name, folder or Hub id; None: `args.model.name`.
        reward_funcs: one or several functions (TRL's contract), or `file.py:name`; None: `args.rewards.functions`.
        args: the configuration.
        train_dataset, eval_dataset: a `datasets.Dataset`, rows, a function, or a source as in `args.data`; None: `args.data`.
        callbacks: `transformers.TrainerCallback`s, as in TRL; `add_callback` adds further ones.
        view: where progress is shown; None: the terminal.

    Attributes:
        can_resume: whether the last `train` has left a checkpoint to resume from.

    Raises:
        ValueError, FileNotFoundError: bad configuration, data or reward functions, with the remedy.
    """

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: DataSource | None = None,
        eval_dataset: DataSource | None = None,
        *,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        view: View | None = None,
    ) -> None:
        config = args or GRPOConfig()
        if model is not None:
            config = config.model_copy(update={"model": config.model.model_copy(update={"name": model})})
        if config.cluster.workers > 1:  # an iterator could be read only once, and every worker reads the data
            train_dataset, eval_dataset = (list(d) if isinstance(d, Iterator) else d for d in (train_dataset, eval_dataset))
        self.can_resume = False
        self._inputs = UserInputs(
            reward_funcs=reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks or ()),
        )
        self.setup = prepare_run(config, self._inputs, view=view or _view_of(config))
        self.config = self.setup.config
        self.view = view or _view_of(self.config)  # now the number of steps is known, also of a run in epochs

    @property
    def state(self) -> TrainerState:
        """`global_step`, `epoch`, `max_steps` and `log_history` of the run."""
        return self.setup.callbacks.state

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call it in further runs of this trainer; a class is instantiated.

        Raises:
            TypeError: it is no `transformers.TrainerCallback`.
        """
        self.setup.callbacks.add(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """No longer call it, or the first one of that class; returns it, or None if there is none."""
        return self.setup.callbacks.remove(callback)

    def train(
        self,
        *,
        resume_from_checkpoint: Resume = False,
        allow_changes: bool = False,
        engine: RolloutEngine | None = None,
    ) -> dict[str, Any]:
        """Run all steps; returns the content of `summary.json`. Whatever ends the run early, it is saved up to its last
        complete step.

        SIGINT (Ctrl-C) and SIGTERM let the step finish, save a checkpoint and raise `RunInterrupted`; a second one kills. A
        signal that comes too late to stop anything sets `interrupted` in the returned summary.

        Args:
            resume_from_checkpoint: True: resume from the newest complete checkpoint of `output_dir`, or start from scratch if
                there is none; a path: from that one. The run then continues bit-exactly on CPU.
            allow_changes: resume although configuration, data or reward functions differ from the checkpoint's.
            engine: sample with this one, which stays open, so that several runs can share it. None: one for this run.

        Raises:
            StorageError: `checkpoint.storage` could not be reached when the run was looked up, or started.
            ValueError: the run in `output_dir` differs, with the differences; or the engine has other settings.
            TrainingStoppedError: the guards gave up.
            ClusterError: a run with `cluster.workers` above 1 has failed.
            RunInterrupted: a signal came; a SystemExit with status 0 once everything is saved.
        """
        self.can_resume = False
        interrupts = self.setup.interrupts
        with self.view, log_to(self.view.note), interrupts.handled(), interrupts.deferred():
            if self.config.cluster.workers > 1:
                summary = self._train_on_cluster(resume_from_checkpoint, allow_changes, engine)
            else:
                self.setup.view, self.setup.last_checkpoint = self.view, None
                try:
                    summary = loop.train(
                        self.setup, resume=resume_from_checkpoint, allow_changes=allow_changes, engine=engine
                    )
                finally:
                    self.can_resume = self.setup.last_checkpoint is not None
            return {**summary, "interrupted": True} if interrupts.requested is not None else summary

    def evaluate(self, *, adapter: Path | None = None) -> float:
        """Mean greedy reward on the evaluation data: of the saved adapter in that folder, or of the base model.

        Raises:
            ValueError: no evaluation data, or no such adapter.
        """
        setup = self.setup
        if setup.eval_prompts is None:
            raise ValueError("no evaluation data: set data.eval, or pass eval_dataset to GRPOTrainer")
        with self.view, log_to(self.view.note), open_scorer_and_session(setup) as session:
            if adapter is not None:
                session.policy.load_adapter(adapter)
                session.publish()
            self.view.stage(f"evaluating {len(setup.eval_prompts)} prompts")
            evaluation = evaluate(
                session.engine, setup.scorer, setup.eval_prompts, self.config, step=0, use_adapter=adapter is not None
            )
            return evaluation.mean_reward

    def _train_on_cluster(self, resume: Resume, allow_changes: bool, engine: RolloutEngine | None) -> dict[str, Any]:
        """Run the loop on several workers."""
        from .cluster.driver import train_on_cluster  # one device needs no Ray

        if engine is not None:
            raise ValueError("every worker of a cluster has its own engine: leave out `engine`, or set cluster.workers=1")
        try:
            summary = train_on_cluster(
                self.config,
                dataclasses.replace(self._inputs, callbacks=self.setup.callbacks.instances),
                storage=self.setup.storage,
                view=self.view,
                interrupts=self.setup.interrupts,
                resume=resume,
                allow_changes=allow_changes,
            )
            self.setup.callbacks.read(self.config.logging.output_dir)
            return summary
        except ClusterError as error:
            self.can_resume = error.can_resume
            raise


def _view_of(config: GRPOConfig) -> View:
    logging = config.logging
    return make_view(max_steps=config.optim.max_steps, run_name=logging.run_name, output_dir=logging.output_dir)
