"""The public trainer.

    from rankup import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(model="smollm2-135m-instruct", reward_funcs=my_reward, args=GRPOConfig(max_steps=50),
                          train_dataset="train.jsonl", eval_dataset="test.jsonl")
    trainer.train()                                 # or train(resume_from_checkpoint=True)
    trainer.evaluate()["eval_reward"]               # of the policy as it is now
    trainer.generate(["What is 2 + 3?"])
    trainer.save_model("my-adapter")
    trainer.close()                                 # gives the memory back; so does `with GRPOTrainer(...) as trainer:`

Making a `GRPOTrainer` checks configuration, data and reward functions and writes nothing; `train` makes the run folder. The
loop itself is in `loop.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import expanduser
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..rollout.engine import RolloutEngine
from . import generation, sharing
from .checkpoint.resume import Resume
from .common.log import log_to, logger
from .config import GRPOConfig
from .display.choose import View, make_view, make_view_without_run
from .evaluating import evaluate_now, prompts_of
from .objects.arguments import (
    Model,
    ProcessingClass,
    RewardFunctions,
    RewardTokenizers,
    functions_of_sets,
    resolve_arguments,
)
from .running import run
from .sessions import Session, Sessions
from .setup import prepare_run
from .trainer_methods import TrainerMethods
from .user_inputs import DataSource, EnvironmentFactories, EpisodeTools, EvalSource, RolloutFunc, UserInputs, of_trainer


class GRPOTrainer(TrainerMethods):
    """Trains one LoRA adapter with GRPO. See the module's docstring.

    The engine and the policy start when they are first needed and stay in memory until `close`, until the trainer is garbage,
    until a run fails, or until another trainer of the process starts its own. They start again when they are needed, with the
    adapter that the run has saved.

    Args:
        model: embedded name, folder or Hub id; a `PreTrainedModel`, which is read, not trained: the trained one is `model`; or
            a `PeftModel`, whose adapter training starts from. None: `args.model.name`.
        reward_funcs: one or several functions (TRL's contract), `file.py:name`, or sequence classifiers, by name or loaded;
            None: `args.rewards.functions`.
        args: the configuration.
        train_dataset: a `datasets.Dataset` or `IterableDataset`, rows, a function, or a source as in `args.data`; None:
            `args.data`.
        eval_dataset: the same, or several by name, each of which is evaluated.
        processing_class: the tokenizer, if it is not the model's own.
        reward_processing_classes: the tokenizers of classifiers, in the order of `reward_funcs`.
        callbacks: `transformers.TrainerCallback`s, as in TRL; `add_callback` adds further ones.
        quantization_config: NF4 (`BitsAndBytesConfig`): `args.model.load_in`.
        peft_config: `peft.LoraConfig`; None: `args.lora`.
        optimizers: of TRL; not supported.
        tools: functions that the model may call; None: `args.rollout.tools`. See docs/episodes.md.
        rollout_func: samples in place of the engine's own loop: see `episodes/rollout_func.py`.
        environment_factory: makes the world of a completion: a class, or several by name, of which a row's column
            `environment` names one; None: `args.rollout.environment`.
        eval_reward_funcs: the reward functions of evaluation sets that have their own, by the name of the set; None:
            `args.rewards.eval_functions`.
        view: where progress is shown; None: the terminal, or the output of the cell in a notebook.

    Attributes:
        args: the configuration, with the number of steps of a run in epochs.
        summary: the content of the last run's `summary.json`; empty before.

    Raises:
        TypeError, ValueError, FileNotFoundError: bad arguments, configuration, data or reward functions, with the remedy.
    """

    def __init__(
        self,
        model: Model | None = None,
        reward_funcs: RewardFunctions | None = None,
        args: GRPOConfig | None = None,
        train_dataset: DataSource | None = None,
        eval_dataset: EvalSource | None = None,
        processing_class: ProcessingClass | None = None,
        reward_processing_classes: RewardTokenizers = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[object, object] | None = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        tools: EpisodeTools | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactories | None = None,
        *,
        eval_reward_funcs: Mapping[str, RewardFunctions] | None = None,
        view: View | None = None,
    ) -> None:
        config, functions = resolve_arguments(
            args or GRPOConfig(),
            model=model,
            reward_funcs=reward_funcs,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.summary: dict[str, Any] = {}
        self._inputs = UserInputs(
            reward_funcs=functions,
            eval_reward_funcs=functions_of_sets(eval_reward_funcs),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks or ()),
            tools=tools,
            environment_factory=environment_factory,
            rollout_func=None if rollout_func is None else of_trainer(rollout_func, self),
        )
        if config.cluster.workers > 1:
            self._inputs = self._inputs.without_streams(config)
        self.setup = prepare_run(config, self._inputs, view=view or _view_of(config))
        self.args = self.setup.config
        self.view = view or _view_of(self.args)  # now the number of steps is known, also of a run in epochs
        self._view_without_run = view or make_view_without_run()
        self._sessions = Sessions(self.setup)
        self._is_shown = False

    # ---------------------------------------------------------------------------------------------- state

    @property
    def state(self) -> TrainerState:
        """`global_step`, `epoch`, `max_steps` and `log_history` of the run."""
        return self.setup.callbacks.state

    @property
    def can_resume(self) -> bool:
        """Whether the last `train` has left a checkpoint to resume from."""
        return self.setup.can_resume

    @property
    def model(self) -> PeftModel:
        """The current policy, which any code for PEFT and transformers models can use: `generate`, `named_parameters`,
        `save_pretrained`. Its base weights may be vLLM's: do not change, merge or move them.

        Raises:
            ValueError: the engine could not be started, with the reason.
        """
        return self._current().policy.peft_model

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run."""
        return self.setup.inputs.tokenizer

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call it in further runs of this trainer; a class is instantiated.

        Raises:
            TypeError: it is no `transformers.TrainerCallback`.
        """
        self.setup.callbacks.add(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """No longer call it, or the first one of that class; returns it, or None if there is none."""
        return self.setup.callbacks.remove(callback)

    def log(self, logs: Mapping[str, float]) -> None:
        """Add metrics to `state.log_history` and tell the callbacks; during a run, also to `metrics.jsonl` and the trackers.

        Raises:
            ValueError: a name is one of the run's own, such as `reward`.
            TypeError: a value is no number.
        """
        self.setup.callbacks.log(logs)

    # ------------------------------------------------------------------------------------------- training

    def train(
        self,
        resume_from_checkpoint: Resume = None,
        *,
        allow_changes: bool = False,
        engine: RolloutEngine | None = None,
    ) -> TrainOutput:
        """Run all steps, from the model that the trainer was given: a second call is a new run. Returns the number of updates,
        the mean loss, and metrics of speed; `summary` has the content of `summary.json`.

        Whatever ends the run early, it is saved up to its last complete step. SIGINT (Ctrl-C) and SIGTERM let the step finish,
        save a checkpoint and raise `RunInterrupted`; a second one kills. In a notebook or at a prompt, Ctrl-C raises
        KeyboardInterrupt instead, and a second one stops at once. A signal that comes too late to stop anything sets
        `interrupted` in `summary`.

        Args:
            resume_from_checkpoint: True: resume from the newest complete checkpoint of `output_dir`, or start from scratch if
                there is none; a path: from that one. The run then continues bit-exactly on CPU.
            allow_changes: resume although configuration, data or reward functions differ from the checkpoint's.
            engine: sample with this one, which is never closed here, so that several trainers can share it.

        Raises:
            StorageError: `checkpoint.storage` could not be reached when the run was looked up, or started.
            ValueError: the run in `output_dir` differs, with the differences; the engine has other settings; or a run of this
                trainer is in progress, as when a callback calls `train`.
            TrainingStoppedError: the guards gave up.
            ClusterError: a run with `cluster.workers` above 1 has failed.
            RunInterrupted: a signal came; a SystemExit with status 0 once everything is saved.
            KeyboardInterrupt: Ctrl-C in a notebook or at a prompt.
        """
        with self._shown(self.view):
            self.summary = run(
                self.setup,
                self._sessions,
                self._inputs,
                resume=resume_from_checkpoint,
                allow_changes=allow_changes,
                engine=engine,
            )
        if self.args.checkpoint.push_to_hub:
            self._push_after_run()
        metrics = self.setup.callbacks.train_metrics(self.summary["seconds"]["total"])
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def evaluate(
        self,
        eval_dataset: EvalSource | None = None,
        *,
        adapter: str | Path | None = None,
        output_file: str | Path | None = None,
    ) -> dict[str, float]:
        """Completions of the evaluation data by the current policy, greedy or as `args.data` says: their metrics, such as
        `eval_reward`, the mean reward. They are added to `state.log_history`, and callbacks see them.

        Args:
            eval_dataset: other data, or several sets by name; None: that of the trainer.
            adapter: evaluate the saved adapter in this folder instead.
            output_file: write the results of all prompts to this JSON file (docs/evaluation.md); None: nowhere.

        Raises:
            ValueError: no evaluation data, or no such adapter.
        """
        with self._shown():
            prompts = prompts_of(self.setup, eval_dataset)
            folder, file = (None if path is None else Path(expanduser(path)) for path in (adapter, output_file))
            with self._sessions.scoring() as session:
                return evaluate_now(self.setup, session, prompts, folder, file)

    def generate(
        self,
        prompts: generation.UserPrompt | Sequence[generation.UserPrompt],
        *,
        temperature: float | None = None,
        max_completion_length: int | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """One completion of each prompt by the current policy, in their order, sampled as in training.

        Args:
            prompts: texts, or conversations (lists of messages), as in the column `prompt` of the data; or one of them.
            temperature: 0 is greedy; None: `rollout.temperature`.
            max_completion_length: in tokens; None: `rollout.max_completion_length`, which is also the most.
            seed: the same seed gives the same completions; None: others each time.

        Raises:
            ValueError: a prompt is neither text nor conversation, or too long; or the engine cannot sample like this.
        """
        return generation.generate(
            lambda: self._current().engine,
            self.setup,
            prompts,
            temperature=temperature,
            max_completion_length=max_completion_length,
            seed=seed,
        )

    def generate_rollout_completions(
        self,
        prompts: Sequence[generation.UserPrompt | Sequence[int]],
        *,
        temperature: float | None = None,
        max_completion_length: int | None = None,
        seed: int | None = None,
    ) -> list[generation.SampledCompletion]:
        """One completion of each prompt with its tokens, for a `rollout_func`: `prompt_ids`, `completion_ids`, `logprobs` (of
        the sampler, of each completion token) and `text`. The arguments are those of `generate`; a prompt may also be a list
        of token ids.

        Raises:
            ValueError: as `generate`.
        """
        return generation.sample(
            lambda: self._current().engine,
            self.setup,
            prompts,
            temperature=temperature,
            max_completion_length=max_completion_length,
            seed=seed,
        )

    # -------------------------------------------------------------------------------------------- leaving

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the current adapter, in PEFT's format, and the tokenizer into a folder; None: `adapter` in the run folder.

        Other files of the folder stay as they are. `rankup export --merge` writes the merged model.

        Raises:
            ValueError: `output_dir` is a file.
        """
        folder = self.args.logging.output_dir / "adapter" if output_dir is None else Path(expanduser(output_dir))
        sharing.write_model(folder, self._current().policy, self.processing_class, self.setup)
        self._sessions.written(folder)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload what `save_model` writes to the Hub; returns the address of the commit.

        Args:
            repo_id: None: `checkpoint.hub_model_id`, or the name of the run folder.
            private: of a repository that does not exist yet; None: `checkpoint.hub_private_repo`.
            token: None: the one of `hf auth login`.

        Raises:
            ValueError: the Hub could not be reached, or refused.
        """
        return sharing.push_to_hub(
            self.save_model,
            repo_id=repo_id or self.args.checkpoint.hub_model_id or self.args.logging.output_dir.resolve().name,
            private=self.args.checkpoint.hub_private_repo if private is None else private,
            token=token,
            commit_message=commit_message,
        )

    def close(self) -> None:
        """Close the engine and free its memory and the policy's. The trainer can still be used: both start again then. In a
        callback it takes effect when the run, or the evaluation, has ended."""
        self._sessions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ internals

    @contextmanager
    def _shown(self, view: View | None = None) -> Iterator[None]:
        """Show progress and notes in this view, or outside of a run as lines; where a run shows its own if there is one."""
        if self._is_shown:
            yield
            return
        self._is_shown = True
        self.setup.view = view = view or self._view_without_run
        try:
            with view, log_to(view.note):
                yield
        finally:
            self._is_shown = False

    def _push_after_run(self) -> None:
        with self._shown():
            try:
                logger.info(f"uploaded to {self.push_to_hub()}")
            except ValueError as error:  # the run itself has ended well
                logger.warning(f"{error}; the adapter is in the run folder, and push_to_hub() tries again")

    def _current(self) -> Session:
        with self._shown():
            return self._sessions.current()


def _view_of(config: GRPOConfig) -> View:
    logging = config.logging
    return make_view(max_steps=config.optim.max_steps, run_name=logging.run_name, output_dir=logging.output_dir)
