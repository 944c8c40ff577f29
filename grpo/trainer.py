"""The loop. Read it from top to bottom.

    from rankup import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(model="smollm2-135m-instruct", reward_funcs=my_reward, args=GRPOConfig(max_steps=50),
                          train_dataset="train.jsonl", eval_dataset="test.jsonl")
    summary = trainer.train()                                   # or train(resume_from_checkpoint=True)

A step: sample groups with vLLM and score each as it finishes; turn rewards into advantages; train on the groups that have
variance, each prompt once, under the eyes of the guards; publish the adapter to vLLM in place. Making a `GRPOTrainer` checks
configuration, data and reward functions and writes nothing; `train` makes the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..rewards.loading import RewardSpec
from ..rollout.engine import RolloutEngine
from .algorithm.advantages import GroupAdvantages
from .checkpoint.manager import RunKeeper, open_recorder, owned_folder
from .checkpoint.resume import Resume, Resumption, find_resumption, summary_of_finished_run
from .checkpoint.storage import Storage
from .checkpoint.store import CheckpointStore
from .common.errors import ClusterError, TrainingStoppedError
from .common.interrupts import Interrupts, RunInterrupted
from .common.memory import resident_mib
from .common.timing import Clock
from .common.world import SINGLE_PROCESS, World
from .config import GRPOConfig
from .data.run_inputs import load_run_inputs
from .data.sampler import PromptSampler
from .display.terminal import View, make_view
from .display.view_text import When
from .experience.batch import collect_batch
from .experience.collect import Collected, make_scorer
from .experience.evaluation import Evaluation, evaluate
from .experience.step_metrics import completions_table
from .guards.evaluations import mean_reward
from .guards.guards import Verdict
from .run.notes import evaluation_notes, start_notes, step_notes
from .run.profiling import profiled, trace_path
from .run.records import RunRecorder
from .run.reporting import check_reports
from .run.worker_reports import exchange_reports, num_tokens, slowest, time_metrics
from .update.objective import Objective
from .update.session import Session, open_session

if TYPE_CHECKING:
    from datasets import Dataset


class GRPOTrainer:
    """Trains one LoRA adapter with GRPO. See the module's docstring.

    Args:
        model: embedded name, folder or hub id; None: `args.model.name`.
        reward_funcs: one or several functions (TRL's contract), or `file.py:name`; None: `args.rewards.functions`.
        args: the configuration.
        train_dataset, eval_dataset: a `datasets.Dataset`, rows, or a source as in `args.data`; None: `args.data`.
        view: where progress is shown; None: the terminal.
        world: the workers of one `torch.distributed` group that share every step; by default this one alone. Each makes a
            trainer with the same arguments; the first records and saves.

    Raises:
        ValueError, FileNotFoundError: bad configuration, data or reward functions, with what to do about it.
    """

    session: Session
    recorder: RunRecorder
    keeper: RunKeeper

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: str | Dataset | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Dataset | Iterable[Mapping[str, Any]] | None = None,
        *,
        view: View | None = None,
        world: World = SINGLE_PROCESS,
    ) -> None:
        config = args or GRPOConfig()
        if model is not None:
            config = config.model_copy(update={"model": config.model.model_copy(update={"name": model})})
        self.config = config
        self.world = world
        if config.cluster.workers > world.size:  # an iterator could be read once only, and all workers do
            train_dataset, eval_dataset = (list(d) if isinstance(d, Iterator) else d for d in (train_dataset, eval_dataset))
        self._given = {"reward_funcs": reward_funcs, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self.scorer = make_scorer(config, reward_funcs)
        Objective(config)  # one of the user's own that cannot be loaded is told now
        self.view = view or make_view(
            max_steps=config.optim.max_steps, run_name=config.logging.run_name, output_dir=config.logging.output_dir
        )
        self.inputs = load_run_inputs(config, train_dataset, eval_dataset)
        self.eval_prompts = self.inputs.eval_prompts
        self.scorer.check_columns(self.inputs.train_prompts.rows[0].columns)
        self.sampler = PromptSampler(
            self.inputs.train_prompts.rows,
            prompts_per_step=config.optim.prompts_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
        )
        self._checkpoints = CheckpointStore(
            config.logging.output_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )
        storage = config.checkpoint.storage
        self._storage = None if storage is None else Storage(storage, config.logging.output_dir)
        self._surroundings: dict[str, Any] = {"note": self.view.note, "world": world, "storage": self._storage}
        self._interrupts = Interrupts()
        self.can_resume = False
        """Whether the last `train` has left a checkpoint of its run."""
        self.should_stop: Callable[[], bool] = lambda: False  # asked between steps, where no signal arrives

    # ------------------------------------------------------------------------------------------------ the run

    def train(
        self,
        *,
        resume_from_checkpoint: Resume = False,
        allow_changes: bool = False,
        engine: RolloutEngine | None = None,
    ) -> dict[str, Any]:
        """Run all steps; returns what `summary.json` says. Whatever ends the run early, what it had learned is saved.

        SIGINT (Ctrl-C) and SIGTERM let the step end, save a checkpoint and raise `RunInterrupted`; a second one kills.

        Args:
            resume_from_checkpoint: True: go on from the newest whole checkpoint of `output_dir`, from the start if there is
                none; a path: from that one. The run is then, to the bit, what it would have been without the interruption.
            allow_changes: go on although configuration, data or reward functions are others than in the checkpoint.
            engine: one to sample with, which stays open: several runs can share it. None: one of its own.

        Raises:
            StorageError: `checkpoint.storage` could not be reached where the run is to be found, or begins.
            ValueError: the run in `output_dir` was made otherwise, with the differences; the engine has other settings.
            TrainingStoppedError: the guards gave up.
            ClusterError: a run with `cluster.workers` above 1 has failed.
            RunInterrupted: a signal came; a SystemExit with status 0 once everything is saved.
        """
        output_dir, self.can_resume = self.config.logging.output_dir, False
        with ExitStack() as stack:
            stack.enter_context(self.view)
            stack.enter_context(self._interrupts.handled())
            stack.enter_context(self._interrupts.deferred())
            check_reports(self.config.logging.report_to)
            if self.config.cluster.workers > self.world.size:
                return self._train_on_cluster(resume_from_checkpoint, allow_changes, engine)
            resumes = bool(resume_from_checkpoint)
            stack.enter_context(owned_folder(output_dir, resumes=resumes, **self._surroundings))
            finish = summary_of_finished_run if resume_from_checkpoint is True else lambda *_: None
            finished = self.world.broadcast_from_main(lambda: finish(self.config, self._fingerprint))
            if finished is not None:
                self.view.note(f"the run in {output_dir} has come to its end: there is nothing left to do")
                return finished
            resumption = self.world.broadcast_from_main(lambda: self._find_resumption(resume_from_checkpoint, allow_changes))
            for note in start_notes(self.config, self.inputs):
                self.view.note(note)
            with self._interrupts.interruptible():
                stack.enter_context(self._open_session(engine))
            stack.enter_context(self._recording(resumption))
            with self.keeper.nothing_lost(self.view):
                self._run()
            self.keeper.save_adapter()
            self.keeper.draw()
            summary = self.keeper.summarise(interrupted=False)
            self.keeper.copy()
            self.view.finish(summary)
            if (asked := self._interrupts.requested) is not None:  # too late to change anything, but a script is to end
                raise RunInterrupted(asked).saved(self.keeper.last)
            return summary

    def _train_on_cluster(self, resume: Resume, allow_changes: bool, engine: RolloutEngine | None) -> dict[str, Any]:
        """The same by several workers, each with a trainer like this one."""
        from .cluster.driver import train_on_cluster  # one device needs no Ray

        if engine is not None:
            raise ValueError("cluster.workers: workers have engines of their own: leave out `engine`, or set it to 1")
        try:
            return train_on_cluster(
                self.config,
                self._given,
                storage=self._storage,
                view=self.view,
                interrupts=self._interrupts,
                resume=resume,
                allow_changes=allow_changes,
            )
        except ClusterError as error:
            self.can_resume = error.can_resume
            raise

    def _run(self) -> None:
        """All steps and evaluations that are left."""
        max_steps, save_steps = self.config.optim.max_steps, self.config.checkpoint.save_steps
        while True:
            self._stop_if_asked()
            step = self.keeper.position.steps_done
            if not self.keeper.position.is_evaluated:
                self._evaluate_at(step, "during" if step else "before")
            if _due(step, save_steps) or (step == max_steps and save_steps):
                self.keeper.save()
            self._stop_if_asked()
            if step == max_steps:
                break
            assert step < max_steps
            with profiled(trace_path(self.config.logging, step + 1, rank=self.world.rank)):
                self._step(step)
        self._finish()

    def _stop_if_asked(self) -> None:
        """Raise RunInterrupted if the run is to stop here: on all workers, if on one."""
        if any(self.world.all_gather(self.should_stop() or self._interrupts.requested is not None)):
            self._interrupts.request()
        self._interrupts.stop_if_requested()

    def _step(self, step: int) -> None:
        """One step, `step` counting from 0: rollout, reward and advantages; train; publish; record."""
        config, session, clock = self.config, self.session, Clock()
        batch = collect_batch(session.engine, self.scorer, self.sampler, config, step=step, world=self.world)
        clock.seconds["rollout"] = batch.collected.rollout_seconds
        clock.seconds["reward"] = batch.collected.reward_seconds
        with clock.phase("train"):
            update = session.learner.update(batch.weighted, step=step, observed=batch.metrics)
        with clock.phase("publish"):
            session.publish()

        groups = batch.collected.groups
        reports = exchange_reports(self.world, session, clock.seconds, groups)
        self.keeper.num_tokens += num_tokens(groups)
        metrics = {
            **batch.metrics,
            **update.metrics,
            "num_tokens": float(self.keeper.num_tokens),
            "memory/resident_mib": resident_mib(),
            **time_metrics(reports, trained_tokens=update.metrics.get("packing/completion_tokens", 0.0)),
        }
        self.recorder.step(step + 1, metrics)
        if update.give_up is None:
            self.keeper.advance(step + 1, is_evaluated=not self._evaluation_is_due(step + 1))
        self.view.step(step + 1, metrics, slowest(reports))
        for note in step_notes(step + 1, groups, update):
            self.view.note(note)
        if step == 0 or _due(step + 1, config.logging.completions_steps):
            self._show_completions(step + 1, batch.collected, batch.advantages)
        if update.give_up is not None:
            raise TrainingStoppedError(update.give_up)

    def _finish(self) -> None:
        """The last evaluation. A run that has fallen away from its best ends with the adapter that had it."""
        max_steps, learner = self.config.optim.max_steps, self.session.learner
        last = None
        if self.eval_prompts is not None and self.config.logging.eval_steps > 0:
            last = self._evaluate(step=max_steps)
        witness = learner.guards.ends_with(None if last is None or last.failures else last.rewards)
        if witness is not None:
            self.keeper.save()  # what the run has come to, before it is left
            if last is not None:
                self._record_evaluation(max_steps, last, "during")
                last = None
            step = learner.restore(witness)
            self.session.publish()
            whose = "that sampled" if witness == "step" else "of the evaluation at"
            self.view.note(f"the reward has fallen from its best: the run ends with the adapter {whose} step {step}")
        if self.eval_prompts is not None:
            self._record_evaluation(max_steps, last or self._evaluate(step=max_steps), "after")

    # ------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, *, adapter: Path | None = None) -> float:
        """Mean greedy reward on the evaluation data: of the saved adapter in that folder, or of the base model.

        Raises:
            ValueError: no evaluation data, or no such adapter.
        """
        if self.eval_prompts is None:
            raise ValueError("no evaluation data: set data.eval, or hand eval_dataset to GRPOTrainer")
        with self.view, self._open_session():
            if adapter is not None:
                self.session.policy.load_adapter(adapter)
                self.session.publish()
            return mean_reward(self._evaluate(step=0, use_adapter=adapter is not None).rewards)

    def _evaluation_is_due(self, steps_done: int) -> bool:
        """Whether to evaluate at this place; after the last step `_finish` does."""
        logging = self.config.logging
        if self.eval_prompts is None or steps_done == self.config.optim.max_steps:
            return False
        return _due(steps_done, logging.eval_steps) if steps_done else logging.eval_before

    def _evaluate_at(self, step: int, when: When) -> None:
        """Evaluate, and let the guards judge it where the run evaluates as it goes."""
        evaluation = self._evaluate(step=step)
        # A function that failed says nothing of the policy.
        is_judged = self.config.logging.eval_steps > 0 and not evaluation.failures
        verdict = self.session.learner.evaluated(step, evaluation.rewards) if is_judged else Verdict()
        if verdict.restore:
            self.session.publish()
        self._record_evaluation(step, evaluation, when)
        if not verdict.give_up:
            self.keeper.advance(step, is_evaluated=True)
        for text in (*(alarm.text for alarm in verdict.alarms), "" if verdict.give_up else verdict.text):
            if text:
                self.view.note(text)
        if verdict.give_up:
            raise TrainingStoppedError(verdict.text)

    def _record_evaluation(self, step: int, evaluation: Evaluation, when: When) -> None:
        reward = mean_reward(evaluation.rewards)
        self.recorder.evaluation(step, reward, when=when)
        for note in evaluation_notes(evaluation):
            self.view.note(note)
        self.view.evaluation(step, reward, when)

    def _evaluate(self, *, step: int, use_adapter: bool = True) -> Evaluation:
        assert self.eval_prompts is not None
        rows = self.eval_prompts.rows
        self.view.stage(f"evaluating {len(rows)} prompts")
        with self._interrupts.interruptible():  # it can be made again
            return evaluate(
                self.session.engine, self.scorer, rows, self.config, step=step, use_adapter=use_adapter, world=self.world
            )

    def _show_completions(self, step: int, collected: Collected, advantages: Sequence[GroupAdvantages]) -> None:
        own = [(g, a) for g, a in zip(collected.groups, advantages, strict=True) if g.is_own]
        table, columns = completions_table([g for g, _ in own], [a for _, a in own], self.scorer)
        self.recorder.completions(step, table, **columns)
        shown = [
            (g.row.prompt, g.group.completions[0].text, g.scores.total[0])
            for g, _ in own[: self.config.logging.num_completions_to_print]
        ]
        self.view.completions(step, shown)

    # ------------------------------------------------------------------------------------------------ parts

    @contextmanager
    def _open_session(self, engine: RolloutEngine | None = None) -> Iterator[None]:
        """Reward processes, vLLM and the policy."""
        with closing(self.scorer):
            self.scorer.start()  # reward processes load their functions while vLLM starts
            self.view.stage("starting vLLM and loading the model")
            with open_session(
                self.config,
                self.inputs.model_path,
                pad_token_id=cast(int, self.inputs.tokenizer.pad_token_id or 0),
                engine=engine,
                note=self.view.note,
                world=self.world,
            ) as self.session:
                try:
                    yield
                finally:
                    del self.session  # the policy's memory is not to wait for the next one

    @contextmanager
    def _recording(self, resumption: Resumption | None) -> Iterator[None]:
        """The run folder, and where the run begins: at its first step, or at a checkpoint."""
        with open_recorder(self.config, resumption, **self._surroundings) as self.recorder:
            self.keeper = RunKeeper(
                self.config,
                self.session,
                self.recorder,
                self._checkpoints,
                inputs=self._fingerprint,
                **self._surroundings,
            )
            if resumption is None:
                self.keeper.begin(is_evaluated=not self._evaluation_is_due(0))
            else:
                self.keeper.go_on(resumption)
                self.view.resumed(resumption.checkpoint.step, self.recorder.rows())
            try:
                yield
            finally:
                self.can_resume = self.keeper.last is not None
                del self.keeper

    def _find_resumption(self, source: Resume, allow_changes: bool) -> Resumption | None:
        return find_resumption(
            source,
            self.config,
            self._checkpoints,
            inputs=self._fingerprint,
            allow_changes=allow_changes,
            say=self.view.note,
        )

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What the run is made from besides its configuration, for the comparison when it is taken up again."""
        return {**self.inputs.fingerprint(), "reward functions": list(self.scorer.names)}


def _due(steps_done: int, every: int) -> bool:
    return every > 0 and steps_done % every == 0
