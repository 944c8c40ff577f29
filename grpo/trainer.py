"""The loop. Read it from top to bottom.

    from rankup import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(model="smollm2-135m-instruct", reward_funcs=my_reward, args=GRPOConfig(max_steps=50),
                          train_dataset="train.jsonl", eval_dataset="test.jsonl")
    summary = trainer.train()

A step: sample groups with vLLM and score each as it finishes; turn rewards into advantages; train on the groups that have
variance, each prompt once, under the eyes of the guards; publish the adapter to vLLM in place. Making a `GRPOTrainer` checks
configuration, data and reward functions and writes nothing; `train` makes the run folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from ..kernels.cpu_memory import keep_freed_memory
from ..rewards.loading import RewardSpec
from ..rollout.engine import RolloutEngine
from .advantages import GroupAdvantages
from .batch import collect_batch
from .collect import Collected, ScoredGroup, collect, engine_settings, greedy_settings, make_scorer
from .config import GRPOConfig, dump_config
from .corrections import sampling_warnings
from .data import PromptData, PromptSampler, load_rows, prepare_prompts
from .guard_evaluations import Rewards, mean_reward
from .learner import Learner, Update
from .models import resolve_model
from .objective import Objective
from .policy import Policy
from .prove import prove_slots
from .quiet import quiet_stderr
from .ranks import describe
from .records import RunRecorder, When
from .step_metrics import completions_table, failures
from .terminal import View, make_view

if TYPE_CHECKING:
    from datasets import Dataset


class TrainingStoppedError(ValueError):
    """The guards gave up on the run. What it had learned is saved."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Rewards of the evaluation data in its order, and why functions that failed gave none of their own."""

    rewards: Rewards
    failures: dict[str, list[str]]


class Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


class GRPOTrainer:
    """Trains one LoRA adapter with GRPO. See the module's docstring.

    Args:
        model: embedded name, folder or hub id; None: `args.model.name`.
        reward_funcs: one or several functions (TRL's contract), or `file.py:name`; None: `args.rewards.functions`.
        args: the configuration.
        train_dataset, eval_dataset: a `datasets.Dataset`, rows, or a source as in `args.data`; None: `args.data`.
        view: where progress is shown; None: the terminal.

    Raises:
        ValueError, FileNotFoundError: bad configuration, data or reward functions, with what to do about it.
    """

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: str | Dataset | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Dataset | Iterable[Mapping[str, Any]] | None = None,
        *,
        view: View | None = None,
    ) -> None:
        config = args or GRPOConfig()
        if model is not None:
            config = config.model_copy(update={"model": config.model.model_copy(update={"name": model})})
        self.config = config
        self.scorer = make_scorer(config, reward_funcs)
        Objective(config)  # one of the user's own that cannot be loaded is told now
        self.view = view or make_view(max_steps=config.optim.max_steps, run_name=config.logging.run_name)
        train_rows = self._rows(train_dataset, config.data.train, split=config.data.train_split)
        eval_rows = self._rows(eval_dataset, config.data.eval, split=config.data.eval_split)
        if train_rows is None:
            raise ValueError("no training data: set data.train, or hand train_dataset to GRPOTrainer")
        with quiet_stderr():
            self.model_path = resolve_model(config.model.name, revision=config.model.revision, say=self.view.stage)
            self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.train_prompts = self._prompts(train_rows)
        self.eval_prompts = None if eval_rows is None else self._prompts(eval_rows[: config.data.eval_rows])
        self.scorer.check_columns(self.train_prompts.rows[0].columns)
        self.sampler = PromptSampler(
            self.train_prompts.rows,
            prompts_per_step=config.optim.prompts_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
        )
        self._tokens_seen = 0

    # ------------------------------------------------------------------------------------------------ the run

    def train(self, *, engine: RolloutEngine | None = None) -> dict[str, Any]:
        """Run all steps; returns what `summary.json` says. Ctrl-C saves the adapter and the summary, then raises.

        engine: one to sample with, which stays open: several runs can share it. None: one of its own.

        Raises:
            ValueError: the engine was made with other settings than this run needs.
            TrainingStoppedError: the guards gave up.
        """
        config = self.config
        with self.view:
            self._announce()
            with self._engine_and_policy(engine):
                self.recorder = RunRecorder(config.logging.output_dir, config_yaml=dump_config(config))
                if self.recorder.moved_aside is not None:
                    self.view.note(
                        f"the run that was in {config.logging.output_dir} is now in {self.recorder.moved_aside}"
                    )
                try:
                    if config.logging.eval_before:
                        self._evaluate_at(0, "before")
                    for step in range(config.optim.max_steps):
                        self._step(step)
                        if _due(step + 1, config.checkpoint.save_steps):
                            self.policy.save_adapter(self.recorder.adapter_dir)
                        if step + 1 < config.optim.max_steps and _due(step + 1, config.logging.eval_steps):
                            self._evaluate_at(step + 1, "during")
                    self._finish()
                except BaseException:  # Ctrl-C, a reward function's error: what was learned is kept, whatever ends the run
                    self._save(interrupted=True)
                    self.view.note(f"interrupted: the adapter as it was is in {self.recorder.adapter_dir}")
                    raise
                return self._save(interrupted=False)

    def _step(self, step: int) -> None:
        """One step, `step` counting from 0: rollout, reward and advantages; train; publish; record."""
        config, clock = self.config, Clock()
        batch = collect_batch(self.engine, self.scorer, self.sampler, config, step=step)
        clock.seconds["rollout"] = batch.collected.rollout_seconds
        clock.seconds["reward"] = batch.collected.reward_seconds
        with clock.phase("train"):
            update = self.learner.update(batch.weighted, step=step, observed=batch.metrics)
        with clock.phase("publish"):
            self.engine.publish(self.policy.write_slots)

        groups = batch.collected.groups
        sampled_tokens = sum(len(c.token_ids) for g in groups for c in g.group.completions)
        trained_tokens = update.metrics.get("packing/completion_tokens", 0.0)
        self._tokens_seen += sampled_tokens + sum(len(g.row.token_ids) * config.rollout.num_generations for g in groups)
        metrics = {
            **batch.metrics,
            **update.metrics,
            "num_tokens": float(self._tokens_seen),
            **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
            "tokens_per_second/rollout": sampled_tokens / clock.seconds["rollout"],
            "tokens_per_second/train": trained_tokens / clock.seconds["train"],
        }
        self.recorder.step(step + 1, metrics)
        self.view.step(step + 1, metrics, clock.seconds)
        self._tell(step + 1, groups, update)
        if step == 0 or _due(step + 1, config.logging.completions_steps):
            self._show_completions(step + 1, batch.collected, batch.advantages)
        if update.give_up is not None:
            raise TrainingStoppedError(update.give_up)

    def _tell(self, step: int, groups: Sequence[ScoredGroup], update: Update) -> None:
        for note in update.notes:
            self.view.note(note)
        for name, reasons in failures(groups).items():
            self.view.note(f"step {step}: reward function {name!r} failed on {len(reasons)} completions: {reasons[0]}")
        unscored = sum(
            reward is None and not any(errors[row] for errors in g.scores.errors.values())
            for g in groups
            for row, reward in enumerate(g.scores.total)
        )
        if unscored:
            self.view.note(f"step {step}: no reward function applied to {unscored} completions; they teach nothing")

    def _finish(self) -> None:
        """The last evaluation. A run that has fallen away from its best ends with the adapter that had it."""
        max_steps, guards = self.config.optim.max_steps, self.learner.guards
        last = None
        if self.eval_prompts is not None and self.config.logging.eval_steps > 0:
            last = self._evaluate(step=max_steps)
        witness = guards.ends_with(None if last is None or last.failures else last.rewards)
        if witness is not None:
            if last is not None:
                self._record_evaluation(max_steps, last, "during")
                last = None
            step = self.learner.restore(witness)
            self.engine.publish(self.policy.write_slots)
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
        with self.view, self._engine_and_policy():
            if adapter is not None:
                self.policy.load_adapter(adapter)
                self.engine.publish(self.policy.write_slots)
            return mean_reward(self._evaluate(step=0, use_adapter=adapter is not None).rewards)

    def _evaluate_at(self, step: int, when: When) -> None:
        """Evaluate, and let the guards judge it where the run evaluates as it goes."""
        if self.eval_prompts is None:
            return
        evaluation = self._evaluate(step=step)
        self._record_evaluation(step, evaluation, when)
        if self.config.logging.eval_steps == 0 or evaluation.failures:  # a function that failed says nothing of the policy
            return
        verdict = self.learner.evaluated(step, evaluation.rewards)
        for text in (*(alarm.text for alarm in verdict.alarms), "" if verdict.give_up else verdict.text):
            if text:
                self.view.note(text)
        if verdict.restore:
            self.engine.publish(self.policy.write_slots)
        if verdict.give_up:
            raise TrainingStoppedError(verdict.text)

    def _record_evaluation(self, step: int, evaluation: Evaluation, when: When) -> None:
        for name, reasons in evaluation.failures.items():
            self.view.note(f"evaluation: reward function {name!r} failed on {len(reasons)} completions: {reasons[0]}")
        reward = mean_reward(evaluation.rewards)
        self.recorder.evaluation(step, reward, when=when)
        self.view.evaluation(step, reward, when)

    def _evaluate(self, *, step: int, use_adapter: bool = True) -> Evaluation:
        """Greedy completions of the evaluation data, scored."""
        assert self.eval_prompts is not None
        self.view.stage(f"evaluating {len(self.eval_prompts.rows)} prompts")
        collected = collect(
            self.engine,
            self.scorer,
            self.eval_prompts.rows,
            greedy_settings(self.config),
            seed=None,
            trainer_state={"global_step": step, "max_steps": self.config.optim.max_steps},
            use_adapter=use_adapter,
        )
        rewards = [reward for group in collected.groups for reward in group.scores.total]
        return Evaluation(rewards=rewards, failures=failures(collected.groups))

    # ---------------------------------------------------------------------------------------------- records

    def _show_completions(self, step: int, collected: Collected, advantages: Sequence[GroupAdvantages]) -> None:
        table, columns = completions_table(collected.groups, advantages, self.scorer)
        self.recorder.completions(step, table, **columns)
        shown = [
            (g.row.prompt, g.group.completions[0].text, g.scores.total[0])
            for g in collected.groups[: self.config.logging.num_completions_to_print]
        ]
        self.view.completions(step, shown)

    def _save(self, *, interrupted: bool) -> dict[str, Any]:
        self.policy.save_adapter(self.recorder.adapter_dir)
        summary = self.recorder.summary(
            {
                "run_name": self.config.logging.run_name,
                "model": self.config.model.name,
                "seed": self.config.seed,
                "interrupted": interrupted,
                "guards": self.learner.guards.metrics(),
            }
        )
        if summary["steps"]:
            from .plots import plot_learning_curve

            plot_learning_curve([self.recorder.output_dir], self.recorder.output_dir / "learning_curve.png")
        self.view.finish(summary)
        return summary

    def _announce(self) -> None:
        """What is known about the run before it starts."""
        rollout = self.config.rollout
        warnings = sampling_warnings(
            temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p
        )
        for line in [*describe(self.config), *warnings]:
            self.view.note(line)
        for name, prompts in (("training", self.train_prompts), ("evaluation", self.eval_prompts)):
            if prompts is not None and prompts.dropped:
                total = prompts.dropped + len(prompts.rows)
                limit = self.config.rollout.max_prompt_length
                self.view.note(
                    f"{prompts.dropped} of {total} {name} prompts are longer than {limit} tokens and were dropped"
                )

    # ------------------------------------------------------------------------------------------------ parts

    @contextmanager
    def _engine_and_policy(self, engine: RolloutEngine | None = None) -> Iterator[None]:
        """Start vLLM and the policy on one copy of the adapter, prove the map, and stop the engine (if ours) in the end."""
        config = self.config
        keep_freed_memory()
        with closing(self.scorer):
            self.scorer.start()  # reward processes load their functions while vLLM starts
            self.view.stage("starting vLLM and loading the model")
            settings = engine_settings(config, self.model_path)
            if engine is not None and dataclasses.replace(engine.settings, seed=settings.seed) != settings:
                raise ValueError(
                    f"the engine was made with other settings ({engine.settings}) than this run needs ({settings})"
                )
            with quiet_stderr():
                self.engine = engine or RolloutEngine(settings)
            try:
                self._make_policy()
                yield
            finally:
                if engine is None:
                    self.engine.close()

    def _make_policy(self) -> None:
        """The policy on the engine's slots, proved to be what the engine samples from, and what trains it."""
        config = self.config
        with quiet_stderr():
            self.policy = Policy(
                self.model_path,
                lora=config.lora,
                dtype=config.model.dtype,
                seed=config.seed,
                device=self.engine.device,
                gradient_checkpointing=config.optim.gradient_checkpointing,
                logits_mib=config.optim.logits_mib,
            )
        self.policy.attach(self.engine.slots)
        if self.policy.plain_reason is not None:
            self.view.note(f"each prompt is computed once per completion: {self.policy.plain_reason}")
        self.view.note(self.policy.fusion.summary)
        prove_slots(self.policy, self.engine)
        self.learner = Learner(self.policy, config, pad_token_id=self.tokenizer.pad_token_id or 0)

    def _rows(self, given: Any, configured: str | None, *, split: str) -> list[dict[str, Any]] | None:
        source = configured if given is None else given
        if source is None:
            return None
        data = self.config.data
        takes_options = isinstance(source, str) and ":" in source
        return load_rows(
            source,
            split=split,
            subset=data.subset,
            options=data.options if takes_options else None,
            base_dir=self.config.base_dir,
        )

    def _prompts(self, rows: Sequence[Mapping[str, Any]]) -> PromptData:
        data = self.config.data
        return prepare_prompts(
            rows,
            self.tokenizer,
            prompt_column=data.prompt_column,
            system_prompt=data.system_prompt,
            max_prompt_length=self.config.rollout.max_prompt_length,
            chat_template_kwargs=data.chat_template_kwargs,
        )


def _due(steps_done: int, every: int) -> bool:
    return every > 0 and steps_done % every == 0
