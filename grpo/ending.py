"""How a run ends: its last files, and what is saved if an error ends it.

    with save_on_error(ctx):
        loop.run(ctx)
    summary = write_final_files(ctx)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .common.errors import Attempts, TrainingStoppedError
from .common.interrupts import RunInterrupted
from .common.log import logger
from .context import RunContext


@contextmanager
def save_on_error(ctx: RunContext) -> Iterator[None]:
    """If an exception (a signal, an error of a reward function, a full disk) ends the block: save as much as possible."""
    try:
        yield
    except BaseException as error:  # raised again
        attempts, checkpoints = Attempts(), ctx.checkpoints
        # If one of several workers fails, the others are elsewhere: there is no step that all of them could save. These errors
        # are raised by all of them after the same step.
        can_save = ctx.setup.world.size == 1 or isinstance(error, RunInterrupted | TrainingStoppedError)
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
