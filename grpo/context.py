"""The objects of a run in progress: engine, policy, recorder and checkpoints.

    with open_run(setup, resumption, evaluation_pending=True, engine=None) as ctx:
        loop.run(ctx)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from ..rollout.engine import RolloutEngine
from ..rollout.vllm_compat import vllm_version
from .checkpoint.manager import CheckpointManager
from .checkpoint.resume import Resumption
from .common.errors import Attempts
from .common.interrupts import RunInterrupted
from .common.log import logger
from .config import dump_config
from .run.notes import start_notes
from .run.output import RunOutput
from .run.records import RunRecorder
from .run.run_folder import locked_folder
from .setup import RunSetup
from .update.session import Session, open_session

LOCK_TIMEOUT_S = 60.0
"""Seconds that a restarted main worker waits for the run folder's lock, which the failed process may still hold."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The components of the loop. `output` is None on all workers but the main process."""

    setup: RunSetup
    session: Session
    checkpoints: CheckpointManager
    output: RunOutput | None

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

    def draw(self) -> None:
        """Draw the learning curve, if there was a step."""
        if self.output is not None and self.checkpoints.position.steps_done:
            self.output.draw()

    def summarize(self, *, interrupted: bool) -> dict[str, Any]:
        """Write and return the summary; empty on all workers but the main process."""
        if self.output is None:
            return {}
        guards = self.session.learner.guards.metrics()
        return self.output.summarize(guards=guards, inputs=self.setup.fingerprint, interrupted=interrupted)


@contextmanager
def open_run(
    setup: RunSetup, resumption: Resumption | None, *, evaluation_pending: bool, engine: RolloutEngine | None
) -> Iterator[RunContext]:
    """Start reward processes, vLLM and the policy; then start the run from scratch or resume it.

    Args:
        evaluation_pending: of a new run: whether an evaluation is due before its first step.
        engine: a user-supplied one, which stays open; None: one for this run.
    """
    for note in start_notes(setup.config, setup.inputs):
        logger.info(note)
    with ExitStack() as stack:
        with setup.interrupts.interruptible():
            session = stack.enter_context(open_scorer_and_session(setup, engine))
        output = None
        if setup.world.is_main:
            assert setup.view is not None, "the main process has a view"
            recorder = stack.enter_context(_open_recorder(setup, resumption))
            output = RunOutput(setup.config, setup.view, recorder)
        checkpoints = CheckpointManager(
            setup.config,
            session,
            setup.store,
            output=output,
            inputs=setup.fingerprint,
            world=setup.world,
            storage=setup.storage,
        )
        ctx = RunContext(setup=setup, session=session, checkpoints=checkpoints, output=output)
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


@contextmanager
def open_scorer_and_session(setup: RunSetup, engine: RolloutEngine | None = None) -> Iterator[Session]:
    """Start the reward processes, the engine and the policy; stop them at the end.

    Raises:
        ValueError: vLLM is not installed.
    """
    starts_vllm = engine is None and setup.config.rollout.engine == "vllm"
    if starts_vllm:
        vllm_version()  # before anything is started
    with closing(setup.scorer):
        setup.scorer.start()  # reward processes load their functions while vLLM starts
        setup.stage("starting vLLM and loading the model" if starts_vllm else "loading the model")
        with open_session(
            setup.config,
            setup.inputs.model_path,
            pad_token_id=cast(int, setup.inputs.tokenizer.pad_token_id or 0),
            engine=engine,
            world=setup.world,
        ) as session:
            yield session


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


@contextmanager
def save_on_error(ctx: RunContext) -> Iterator[None]:
    """If an exception (a signal, an error of a reward function, a full disk) ends the block: save as much as possible."""
    try:
        yield
    except BaseException as error:  # raised again
        attempts, checkpoints = Attempts(), ctx.checkpoints
        # If one of several workers fails, the others are elsewhere: there is no step that all of them could save.
        can_save = ctx.setup.world.size == 1 or isinstance(error, RunInterrupted)
        is_saved = can_save and attempts.to("save a checkpoint", checkpoints.write) and checkpoints.is_saved
        has_adapter = attempts.to("save the adapter", ctx.save_adapter)
        attempts.to("draw the learning curve", ctx.draw)
        attempts.to("write the summary", lambda: _show_end(ctx, ctx.summarize(interrupted=True)))
        attempts.to("upload the run", checkpoints.upload)
        if isinstance(error, RunInterrupted) and is_saved:
            error.saved(checkpoints.last)
        notes = [f"the newest checkpoint is {checkpoints.last}"] if checkpoints.last is not None else []
        if has_adapter and ctx.output is not None:
            notes.append(f"the current adapter is in {ctx.output.recorder.adapter_dir}")
        attempts.to("report it", lambda: [logger.info(note) for note in [*notes, *attempts.failures]])
        raise


def write_final_files(ctx: RunContext) -> dict[str, Any]:
    """Write the final files of a complete run; returns its summary."""
    ctx.save_adapter()
    ctx.draw()
    summary = ctx.summarize(interrupted=False)
    ctx.checkpoints.upload()
    _show_end(ctx, summary)
    return summary


def _show_end(ctx: RunContext, summary: dict[str, Any]) -> None:
    if ctx.output is not None:
        ctx.output.view.finish(summary)
