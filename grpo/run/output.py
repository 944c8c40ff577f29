"""Output of a run's main process, a callback: view, run folder, trackers, notes. The other processes have none.

    output = RunOutput(config, view, recorder, tokenizer)
    callbacks.begin(steps_done, rows, objects, inside=[output])
    output.draw()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from ...rollout.types import Completion
from ..common.log import logger
from ..config import GRPOConfig
from ..data.groups import Group
from ..display.view import SampleRow, View
from ..display.view_text import When
from ..experience.evaluation import Evaluation
from ..experience.step_metrics import completions_table
from .callbacks import RecordsUserLogs, StepRecord
from .evaluation_records import save_own
from .notes import SamplingNotes, evaluation_notes, step_notes
from .records import RunRecorder
from .reporting import make_reports


class RunOutput(RecordsUserLogs):
    """See the module's docstring. A step is recorded in `on_step_end` and shown in `on_log`."""

    def __init__(
        self, config: GRPOConfig, view: View, recorder: RunRecorder, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.config = config
        self.view = view
        self.recorder = recorder
        self._unshown: StepRecord | None = None
        self._sampling_notes = SamplingNotes(config, tokenizer)

    def open_trackers(self, resume: Mapping[str, Any] | None) -> None:
        """Start the trackers of `logging.report_to`; `resume`: the recorder's state in the checkpoint that the run resumes."""
        logging = self.config.logging
        self.recorder.report_to(
            make_reports(
                logging.report_to,
                output_dir=logging.output_dir,
                run_name=logging.run_name,
                project=logging.project,
                config=self.config.model_dump(mode="json"),
                resume=None if resume is None else resume["reports"],
                resume_step=0 if resume is None else resume["steps"],
            )
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, *, record: StepRecord, **kwargs: Any) -> None:
        """Record a step."""
        self.recorder.step(state.global_step, record.metrics)
        self._unshown = record

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show the step that was recorded last and its notes, and every so often its completions."""
        record, self._unshown, step = self._unshown, None, state.global_step - 1
        if record is None:
            return
        self.view.step(step + 1, record.metrics, record.seconds)
        of_sampling = self._sampling_notes.about(f"step {step + 1}", record.groups)
        for note in (*record.notes, *step_notes(step, record.groups), *of_sampling):
            logger.info(note)
        every = self.config.logging.completions_steps
        if step == 0 or (every and (step + 1) % every == 0):
            self.completions(step, record.groups)

    def on_user_log(self, state: TrainerState, metrics: Mapping[str, float | None]) -> None:
        """Record what a user logs during the run."""
        self.recorder.log(state.global_step, metrics)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, *, evaluation: Evaluation, when: When, **kwargs: Any
    ) -> None:
        """Record and show an evaluation."""
        metrics, step = evaluation.metrics(), state.global_step
        self.recorder.evaluation(step, metrics, when=when, is_complete=evaluation.is_complete)
        save_own(self.recorder.output_dir, evaluation, self.config, step=step, when=when)
        for note in evaluation_notes(evaluation):
            logger.warning(note)
        for note in self._sampling_notes.about("evaluation", evaluation.groups):
            logger.info(note)
        self.view.evaluation(step, metrics, when)

    def end_with(self, evaluation: Evaluation) -> None:
        """The evaluation that was recorded last is also that after training."""
        metrics = evaluation.metrics()
        self.recorder.end_with(metrics)
        self.view.evaluation(self.config.optim.max_steps, metrics, "after")

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Write the completions of this worker's groups, and show a few. `step`: updates done before it."""
        local = [group for group in groups if group.is_local]
        table = completions_table(local)
        self.recorder.completions(step + 1, table.table, rewards=table.rewards, extras=table.extras, data=table.data)
        shown = [
            SampleRow(
                group.prompt.content,
                _shown(group.completions[0]),
                reward=group.scores.total[0],
                advantage=group.advantages[0] if group.advantages else None,
            )
            for group in local[: self.config.logging.num_completions_to_print]
        ]
        self.view.completions(step + 1, shown)

    def draw(self) -> None:
        """`learning_curve.png`, if any step had a reward."""
        from .plots import plot_learning_curve

        if all(row.get("reward") is None for row in self.recorder.rows()):
            return
        run_dir = self.recorder.output_dir
        plot_learning_curve([run_dir], run_dir / "learning_curve.png")

    def summarize(
        self, *, guards: Mapping[str, float], inputs: Mapping[str, Any], data: Mapping[str, Any], interrupted: bool
    ) -> dict[str, Any]:
        """Write `summary.json`, the last file of a run: it says whether the run is complete."""
        return self.recorder.summary(
            {
                "run_name": self.config.logging.run_name,
                "model": self.config.model.name,
                "seed": self.config.seed,
                "interrupted": interrupted,
                "guards": guards,
                "inputs": inputs,
                "data": data,
            }
        )


def _shown(completion: Completion) -> str | Sequence[Mapping[str, Any]]:
    """The text, or the messages of an episode, and why it is void."""
    if completion.episode is None:
        return completion.text
    failure = completion.episode.failure
    if failure is None:
        return completion.episode.messages
    return [*completion.episode.messages, {"role": "void", "content": failure.strip().rpartition("\n")[2]}]
