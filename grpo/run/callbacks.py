"""Callbacks of the user: `transformers.TrainerCallback`s, the state that they see, and what they ask of the loop.

    callbacks = Callbacks([EarlyStopping()], config, num_rows=len(prompts))
    callbacks.begin(0, [], model=model, tokenizer=tokenizer, optimizer=optimizer, inside=[output])
    callbacks.step_begin(0)
    callbacks.record_step(1, record)            # on_step_end of those inside: recorder, profiler
    callbacks.step_end(record)                  # on_step_end of the user's, then on_log of all
    if callbacks.requests.stop: ...

Recorder, view, trackers and profiler are callbacks too, those inside. They come first, so that a step is recorded, and
can be saved, before a user's callback can fail. Events come in transformers' order, and on every worker: a callback that prints
looks at `state.is_world_process_zero`. What one worker's callbacks ask for counts for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn, optim
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState

from ...rewards.contract import History
from ..common.log import logger
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.groups import Group
from ..display.view_text import When
from ..experience.evaluation import Evaluation
from .records import read_metrics, read_summary

HISTORY_FOR_REWARDS = 1000
"""The newest rows of `log_history` that reward functions get: a copy in each call, and sent to processes."""

NAMES_OF_THE_RUN = frozenset({"step", "epoch", "loss", "reward", "eval_reward"})
"""What tells the rows of steps and evaluations from those of a user, who cannot log them."""


@dataclass(frozen=True, slots=True)
class Requests:
    """What callbacks asked for since the last step began: to end the training, to evaluate, to save a checkpoint."""

    stop: bool = False
    evaluate: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step, as `on_step_end` gets it in `record`.

    Attributes:
        groups: the prompts with their completions, rewards and advantages.
        metrics: those of `metrics.jsonl`.
        seconds: by phase, of the slowest worker.
        notes: about the update.
    """

    groups: Sequence[Group]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    notes: Sequence[str]


class RecordsUserLogs(TrainerCallback):
    """A callback inside that records what a user logs during a run."""

    def on_user_log(self, state: TrainerState, metrics: Mapping[str, float | None]) -> None:
        """See the class."""
        raise NotImplementedError


class Callbacks:
    """See the module's docstring.

    Args:
        callbacks: instances, or classes that need no arguments.
        num_rows: of the training data, for `state.epoch`.

    Attributes:
        state: `global_step` counts updates done; `log_history` has a dictionary of metrics for each step and evaluation.
        instances: the callbacks, in the order of their calls.
        control: the flags that callbacks set.
        requests: what the flags of all workers ask for.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        config: GRPOConfig,
        *,
        num_rows: int,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self.state = TrainerState(
            max_steps=config.optim.max_steps,
            eval_steps=config.logging.eval_steps,
            save_steps=config.checkpoint.save_steps,
            logging_steps=1,
            is_local_process_zero=world.is_main,
            is_world_process_zero=world.is_main,
        )
        self.control = TrainerControl()
        self.requests = Requests()
        self.instances: list[TrainerCallback] = []
        self._inside: Sequence[TrainerCallback] = ()
        self._config = config
        self._steps_per_epoch = num_rows / config.optim.prompts_per_step
        self._world = world
        self._objects: dict[str, Any] = dict.fromkeys(
            ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        )
        self.state.num_train_epochs = math.ceil(self.state.max_steps / self._steps_per_epoch)
        for callback in callbacks:
            self.add(callback)
        self._event(self.instances, "on_init_end")

    def add(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call it from now on; a class is instantiated.

        Raises:
            TypeError: it is no `transformers.TrainerCallback`.
        """
        instance = callback() if isinstance(callback, type) else callback
        if not isinstance(instance, TrainerCallback):
            raise TypeError(f"callbacks: {instance!r} is no transformers.TrainerCallback: derive its class from it")
        self.instances.append(instance)

    def remove(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """No longer call it, or the first one of that class; returns it, or None if there is none."""
        for instance in self.instances:
            if instance is callback or (isinstance(callback, type) and isinstance(instance, callback)):
                self.instances.remove(instance)
                return instance
        return None

    # ------------------------------------------------------------------------------------------------ events

    def begin(
        self,
        steps_done: int,
        rows: Sequence[Mapping[str, Any]],
        *,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: optim.Optimizer,
        inside: Sequence[TrainerCallback] = (),
    ) -> None:
        """The run starts, or resumes after `steps_done` steps; `rows` are those of `metrics.jsonl`."""
        self._objects |= {"model": model, "processing_class": tokenizer, "optimizer": optimizer}
        self._inside = inside
        self.restore(steps_done, rows)
        self.control = TrainerControl()
        if steps_done == 0:
            self.state.best_metric = self.state.best_global_step = None
        self._event(self._all, "on_train_begin")
        self._event(self._all, "on_epoch_begin")
        self._collect_requests()

    def release(self) -> None:
        """Forget model and optimizer, which would stay in memory otherwise."""
        self._objects = dict.fromkeys(self._objects)

    def restore(self, steps_done: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Set the state to that after `steps_done` steps, which wrote these rows of `metrics.jsonl`."""
        self._set_step(steps_done)
        self.state.log_history = [{**row, "epoch": self._epoch(int(row["step"]))} for row in rows]

    def read(self, run_dir: Path) -> None:
        """Set the state to that at the end of the run in that folder, which other processes have made."""
        rows, summary = read_metrics(run_dir), read_summary(run_dir)
        self.restore(rows[-1]["step"] if rows else 0, rows)
        evaluated = [(row["eval_reward"], row["step"]) for row in rows if row.get("eval_reward") is not None]
        if evaluated:
            self.state.best_metric, self.state.best_global_step = max(evaluated, key=lambda one: one[0])
        if summary is not None:
            end: dict[str, Any] = dict(self.train_metrics(summary["seconds"]["total"]))
            self.state.log_history.append({**end, "epoch": self.state.epoch, "step": self.state.global_step})

    def state_for_rewards(self) -> dict[str, Any]:
        """For the `trainer_state` of reward functions: numbers and texts of the state, and the newest rows of its history."""
        values = vars(self.state).items()
        plain = {name: value for name, value in values if value is None or isinstance(value, str | int | float)}
        return {**plain, "log_history": History(self.state.log_history[-HISTORY_FOR_REWARDS:])}

    def step_begin(self, step: int) -> None:
        """A step begins, after `step` updates. What was asked for before is forgotten, a stop aside."""
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self._event(self._all, "on_step_begin")

    def optimizer_step(self) -> None:
        """The weights were updated."""
        self._event(self._all, "on_optimizer_step")

    def record_step(self, steps_done: int, record: StepRecord) -> None:
        """A step is over, `steps_done` updates are done: those inside record it."""
        self._set_step(steps_done)
        self._event(self._inside, "on_step_end", record=record)

    def step_end(self, record: StepRecord) -> None:
        """The step that `record_step` has recorded: the user's callbacks see it, and all of them its metrics."""
        self._event(self.instances, "on_step_end", record=record)
        if int(self.state.epoch or 0) > int(self._epoch(self.state.global_step - 1)):
            self._event(self._all, "on_epoch_end")
            self._event(self._all, "on_epoch_begin")
        self._log(record.metrics)
        self._collect_requests()

    def record_evaluation(self, evaluation: Evaluation, when: When) -> None:
        """An evaluation is over: those inside record it."""
        self._event(self._inside, "on_evaluate", evaluation=evaluation, when=when)

    def evaluate(self, metrics: Mapping[str, float], *, is_of_run: bool = True) -> None:
        """An evaluation: the user's callbacks see its metrics, whose names begin with `eval_`; None in the place of NaN, since
        transformers' `EarlyStoppingCallback` takes NaN for a decline.

        is_of_run: it can be the best one of the run; not if the user asked for it.
        """
        if is_of_run:  # else the one that a callback has asked for is still due
            self.control.should_evaluate = False
        known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
        self._log(known)
        self._event(self.instances, "on_evaluate", metrics={**known, "epoch": self.state.epoch})
        best, reward = self.state.best_metric, known["eval_reward"]
        is_best = reward is not None and (best is None or reward > best)
        if is_of_run and is_best:  # after the event, as in transformers
            self.state.best_metric, self.state.best_global_step = reward, self.state.global_step
        self._collect_requests()

    def save(self) -> None:
        """A checkpoint was written."""
        self.control.should_save = False
        self._event(self._all, "on_save")

    def end(self, seconds: float) -> None:
        """The training has ended and its files are written; it took `seconds`."""
        self._log(self.train_metrics(seconds))
        self._event(self._all, "on_train_end")

    def detach(self) -> None:
        """The run is over, in whatever way: those inside are called no more."""
        self._inside = ()

    def train_metrics(self, seconds: float) -> dict[str, float]:
        """What `train` returns, by transformers' names; samples are completions."""
        losses = [row["loss"] for row in self.state.log_history if "loss" in row]
        steps, config = self.state.global_step, self._config
        samples = steps * config.optim.prompts_per_step * config.rollout.num_generations
        return {
            "train_runtime": seconds,
            "train_samples_per_second": samples / seconds,
            "train_steps_per_second": steps / seconds,
            "train_loss": sum(losses) / len(losses) if losses else 0.0,
        }

    def log(self, metrics: Mapping[str, float]) -> None:
        """A user's metrics: added to `log_history` and, during a run, to `metrics.jsonl`.

        Raises:
            ValueError: a name is in `NAMES_OF_THE_RUN`.
            TypeError: a value is no number.
        """
        numbers = _numbers(metrics)
        for callback in self._inside:
            if isinstance(callback, RecordsUserLogs):
                callback.on_user_log(self.state, numbers)
        self._log(numbers)

    # ------------------------------------------------------------------------------------------- checkpoints

    def states(self) -> dict[str, Any]:
        """The best evaluation, and the states of the user's callbacks that export one (`ExportableState`), as plain data.

        Raises:
            ValueError: a callback's state is no plain data.
        """
        found = []
        for callback in self.instances:
            if isinstance(callback, ExportableState):
                attributes = callback.state()["attributes"]
                try:
                    found.append((type(callback).__name__, json.loads(json.dumps(attributes))))
                except TypeError as error:
                    name = type(callback).__name__
                    raise ValueError(f"callback {name}: its state() must be JSON data: {error}") from None
        return {"best": [self.state.best_metric, self.state.best_global_step], "exported": found}

    def restore_states(self, states: Mapping[str, Any]) -> None:
        """Set what `states` returned; states of callbacks that this run does not have are skipped, with a note."""
        self.state.best_metric, self.state.best_global_step = states.get("best", (None, None))
        waiting = [callback for callback in self.instances if isinstance(callback, ExportableState)]
        for name, attributes in states.get("exported", ()):
            callback = next((one for one in waiting if type(one).__name__ == name), None)
            if callback is None:
                logger.info(f"the checkpoint has the state of a callback {name}, which this run does not have")
                continue
            waiting.remove(callback)
            for attribute, value in attributes.items():
                setattr(callback, attribute, value)

    # ---------------------------------------------------------------------------------------------- internals

    def _log(self, metrics: Mapping[str, float | None]) -> None:
        logs = {**metrics, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event(self._all, "on_log", logs=logs)

    @property
    def _all(self) -> list[TrainerCallback]:
        return [*self._inside, *self.instances]

    def _event(self, callbacks: Sequence[TrainerCallback], name: str, **more: Any) -> None:
        for callback in callbacks:
            control = getattr(callback, name)(self._config, self.state, self.control, **self._objects, **more)
            self.control = self.control if control is None else control

    def _collect_requests(self) -> None:
        control = self.control
        flags = (control.should_training_stop, control.should_evaluate, control.should_save)
        self.requests = Requests(*map(any, zip(*self._world.all_gather(flags), strict=True)))

    def _set_step(self, steps_done: int) -> None:
        self.state.global_step = steps_done
        self.state.epoch = self._epoch(steps_done)

    def _epoch(self, steps_done: int) -> float:
        return steps_done / self._steps_per_epoch


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """A user's metrics as Python's numbers, from scalars of any library. None stays: there is no value."""
    if taken := sorted(NAMES_OF_THE_RUN.intersection(metrics)):
        raise ValueError(f"log: {', '.join(taken)} {'is' if len(taken) == 1 else 'are'} logged by the run: use another name")
    numbers: dict[str, float | None] = {}
    for name, value in metrics.items():
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            numbers[str(name)] = value if value is None else int(value) if isinstance(value, Integral) else float(value)
        except (TypeError, ValueError, RuntimeError):  # the last one is torch's, of a tensor with several elements
            raise TypeError(f"log: {name} must be a number (got {value!r})") from None
    return numbers
