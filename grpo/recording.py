"""The end of a step: its metrics of all workers, recorded, shown, and seen by callbacks."""

from __future__ import annotations

from ..kernels.cuda_memory import peak_memory
from .common.memory import resident_mib
from .common.timing import Clock
from .context import RunContext
from .evaluating import evaluation_is_due
from .experience.batch import Batch
from .run.callbacks import StepRecord
from .run.worker_reports import exchange_reports, num_tokens, slowest, time_metrics
from .update.learner import Update


def record_step(
    ctx: RunContext,
    step: int,
    batch: Batch,
    metrics: dict[str, float],
    update: Update,
    clock: Clock,
    *,
    is_complete: bool,
) -> None:
    """Record and show a step. Once its metrics are written, a checkpoint of this step is valid, also if a callback fails."""
    checkpoints = ctx.checkpoints
    reports = exchange_reports(ctx.setup.world, ctx.session, clock.seconds, batch.groups)
    checkpoints.num_tokens += num_tokens(reports)
    metrics = {
        **metrics,
        "num_tokens": float(checkpoints.num_tokens),
        "memory/resident_mib": resident_mib(),
        **_gpu_memory(ctx),
        **time_metrics(reports, trained_tokens=metrics.get("packing/completion_tokens", 0.0)),
    }
    record = StepRecord(groups=batch.groups, metrics=metrics, seconds=slowest(reports), notes=update.notes)
    ctx.setup.callbacks.record_step(step + 1, record)
    if is_complete:
        checkpoints.set_position(step + 1, evaluation_pending=evaluation_is_due(ctx.setup, step + 1))
    ctx.setup.callbacks.step_end(record)
    if is_complete:  # again: callbacks can ask for an evaluation, log, and draw random numbers
        checkpoints.set_position(step + 1, evaluation_pending=evaluation_is_due(ctx.setup, step + 1))


def _gpu_memory(ctx: RunContext) -> dict[str, float]:
    """Peaks of the step on this worker's GPU, and what the memory plan expects while training, in MiB. Empty on CPU."""
    peaks = {f"memory/gpu_{name}_mib": size / 2**20 for name, size in peak_memory().items()}
    planned = ctx.session.planned_bytes
    return peaks if planned is None else {**peaks, "memory/gpu_planned_mib": planned / 2**20}
