"""One call of `GRPOTrainer.train`: on this device or on a cluster, with signals handled.

    summary = run(setup, sessions, inputs, resume=True, allow_changes=False, engine=None)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..kernels.cpu_memory import return_freed_memory
from ..rollout.engine import RolloutEngine
from . import loop
from .checkpoint.resume import Resume
from .common.errors import ClusterError, forget_models
from .common.interrupts import RunInterrupted, is_interactive
from .data.run_inputs import NO_TRAINING_DATA
from .sessions import Sessions
from .setup import RunSetup
from .user_inputs import UserInputs


def run(
    setup: RunSetup,
    sessions: Sessions,
    inputs: UserInputs,
    *,
    resume: Resume,
    allow_changes: bool,
    engine: RolloutEngine | None,
) -> dict[str, Any]:
    """The content of `summary.json`. See `GRPOTrainer.train`; `setup.can_resume` says whether there is a checkpoint."""
    if sessions.is_in_use:  # a callback has called train, or another thread
        raise ValueError("this trainer is in the middle of a run or an evaluation: call train again when that has ended")
    if not setup.inputs.has_training_data:
        raise ValueError(NO_TRAINING_DATA)
    interrupts = setup.interrupts
    setup.can_resume = False
    try:
        with interrupts.handled(), interrupts.deferred():
            if setup.config.cluster.workers > 1:
                if engine is not None:
                    raise ValueError(
                        "every worker of a cluster has its own engine: leave out `engine`, or set cluster.workers=1"
                    )
                summary = _run_on_cluster(setup, sessions, inputs, resume, allow_changes)
            else:
                summary = _run_here(setup, sessions, resume, allow_changes, engine)
            return {**summary, "interrupted": True} if interrupts.requested is not None else summary
    except RunInterrupted as interruption:
        forget_models(interruption)
        return_freed_memory()
        if interruption.signal == "SIGINT" and is_interactive():
            checkpoint = interruption.checkpoint
            raise KeyboardInterrupt(
                "stopped before the first step was done"
                if checkpoint is None
                else f"train(resume_from_checkpoint=True) continues the run from {checkpoint}"
            ) from None
        raise
    except BaseException as error:  # raised again
        forget_models(error)
        return_freed_memory()
        raise


def _run_here(
    setup: RunSetup, sessions: Sessions, resume: Resume, allow_changes: bool, engine: RolloutEngine | None
) -> dict[str, Any]:
    setup.last_checkpoint = None
    try:
        return loop.train(setup, sessions, resume=resume, allow_changes=allow_changes, engine=engine)
    finally:
        setup.can_resume = setup.last_checkpoint is not None


def _run_on_cluster(
    setup: RunSetup, sessions: Sessions, inputs: UserInputs, resume: Resume, allow_changes: bool
) -> dict[str, Any]:
    from .cluster.driver import train_on_cluster  # one device needs no Ray

    sessions.close()  # a worker may need the device
    assert setup.view is not None
    try:
        summary = train_on_cluster(
            setup.config,
            dataclasses.replace(inputs, callbacks=setup.callbacks.instances),
            storage=setup.storage,
            view=setup.view,
            interrupts=setup.interrupts,
            resume=resume,
            allow_changes=allow_changes,
        )
    except ClusterError as error:
        setup.can_resume = error.can_resume
        raise
    sessions.take_finished_run()
    return summary
