"""The objects of a run in progress: engine, policy, recorder and checkpoints.

    with open_run(setup, sessions, resumption, evaluation_pending=True, engine=None) as ctx:
        loop.run(ctx)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..rollout.engine import RolloutEngine
from ..rollout.model_limits import wider_windows
from .checkpoint.manager import CheckpointManager
from .checkpoint.resume import Resumption
from .common.log import logger
from .config import dump_config
from .run.notes import start_notes
from .run.output import RunOutput
from .run.profiling import Profiling
from .run.records import RunRecorder
from .run.run_folder import locked_folder
from .sessions import Sessions
from .setup import RunSetup
from .update.session import Session

LOCK_TIMEOUT_S = 60.0
"""Seconds that a restarted main worker waits for the run folder's lock, which the failed process may still hold."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The components of the loop. `output` is None on all workers but the main process, `inside` the callbacks of our own."""

    setup: RunSetup
    sessions: Sessions
    session: Session
    checkpoints: CheckpointManager
    output: RunOutput | None
    inside: Sequence[TrainerCallback]

    def stop_if_requested(self) -> None:
        """Raise RunInterrupted on all workers if a signal or `stop_requested` asked any of them to stop."""
        interrupts = self.setup.interrupts
        if any(self.setup.world.all_gather(self.setup.stop_requested() or interrupts.requested is not None)):
            interrupts.request()
        interrupts.stop_if_requested()

    def save_adapter(self) -> None:
        """Write the policy into the run folder."""
        if self.output is not None:
            self.session.policy.save_adapter(self.output.recorder.adapter_dir)
            self.sessions.adapter_saved()

    def draw(self) -> None:
        """Draw the learning curve, if there was a step."""
        if self.output is not None and self.checkpoints.position.steps_done:
            self.output.draw()

    def summarize(self, *, interrupted: bool) -> dict[str, Any]:
        """Write and return the summary; empty on all workers but the main process."""
        if self.output is None:
            return {}
        guards = self.session.learner.guards.metrics()
        setup = self.setup
        return self.output.summarize(
            guards=guards, inputs=setup.fingerprint, data=setup.inputs.counts(), interrupted=interrupted
        )


@contextmanager
def open_run(
    setup: RunSetup,
    sessions: Sessions,
    resumption: Resumption | None,
    *,
    evaluation_pending: bool,
    engine: RolloutEngine | None,
) -> Iterator[RunContext]:
    """Start reward processes, vLLM and the policy; then start the run from scratch or resume it.

    Args:
        evaluation_pending: of a new run: whether an evaluation is due before its first step.
        engine: a user-supplied one, which stays open; None: one of `sessions`.
    """
    about_windows = wider_windows(setup.inputs.model_path, setup.config.rollout)
    for note in chain(start_notes(setup.config, setup.inputs), about_windows):
        logger.info(note)
    with ExitStack() as stack:
        with setup.interrupts.interruptible():
            session = stack.enter_context(sessions.for_run(engine))
        output = None
        if setup.world.is_main:
            assert setup.view is not None, "the main process has a view"
            recorder = stack.enter_context(_open_recorder(setup, resumption))
            output = RunOutput(setup.config, setup.view, recorder, setup.inputs.tokenizer)
        profiling = stack.enter_context(Profiling(setup.config.logging, rank=setup.world.rank))
        checkpoints = CheckpointManager(
            setup.config,
            session,
            setup.store,
            output=output,
            callbacks=setup.callbacks,
            inputs=setup.fingerprint,
            world=setup.world,
            storage=setup.storage,
        )
        inside = [profiling] if output is None else [output, profiling]
        ctx = RunContext(
            setup=setup, sessions=sessions, session=session, checkpoints=checkpoints, output=output, inside=inside
        )
        if resumption is None:
            checkpoints.start(evaluation_pending=evaluation_pending)
        else:
            checkpoints.resume(resumption)
            if output is not None:
                output.view.resumed(resumption.checkpoint.step, output.recorder.rows())
        try:
            yield ctx
        finally:
            setup.last_checkpoint = checkpoints.last
            setup.callbacks.detach()


@contextmanager
def run_folder_owned(setup: RunSetup, *, resumes: bool) -> Iterator[None]:
    """Lock the run folder if it exists. When resuming, then download missing files from `checkpoint.storage`. Does nothing on
    workers other than the main one.

    Raises:
        ValueError: another process writes to the folder.
        StorageError: the storage could not be read.
    """
    if not setup.world.is_main:
        yield
        return
    folder, storage = setup.config.logging.output_dir, setup.storage if resumes else None
    if storage is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, timeout=LOCK_TIMEOUT_S if setup.world.size > 1 else 0.0):
        if storage is not None:
            storage.pull()
            if setup.world.size > 1:
                storage.push()  # workers on other machines read the copy: it must have the newest checkpoint too
        yield


@contextmanager
def _open_recorder(setup: RunSetup, resumption: Resumption | None) -> Iterator[RunRecorder]:
    """The recorder of a new run, or of one that resumes."""
    config, storage = setup.config, setup.storage
    output_dir = config.logging.output_dir
    if storage is not None and resumption is None and (moved := storage.move_aside()) is not None:
        logger.info(f"the run that was in {storage.url} is now in {moved}")
    resume = None if resumption is None else resumption.state.recorder
    with RunRecorder(output_dir, config_yaml=dump_config(config), resume=resume) as recorder:
        if recorder.moved_aside is not None:
            logger.info(f"the run that was in {output_dir} is now in {recorder.moved_aside}")
        yield recorder
