"""The loop. Read it from top to bottom.

    summary = train(prepare_run(config, UserInputs(), view=view), resume=True)

A step: sample groups with the engine and score each as it finishes; turn rewards into advantages; compute gradients on the
groups that have variance, each prompt once; apply the guards' decision; update; publish the adapter to the engine in place;
record. Steps count from 0; the display adds one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ..rollout.engine import RolloutEngine
from .checkpoint.resume import Resume, find_resumption, summary_of_finished_run
from .common.errors import TrainingStoppedError
from .common.log import log_to, logger
from .common.memory import resident_mib
from .common.timing import Clock
from .context import RunContext, open_run, run_folder_owned, save_on_error, write_final_files
from .display.view_text import When
from .experience.batch import Batch, collect_batch
from .experience.evaluation import Evaluation, evaluate
from .run.profiling import profiled, trace_path
from .run.worker_reports import exchange_reports, num_tokens, slowest, time_metrics
from .setup import RunSetup
from .update.learner import Update


def train(
    setup: RunSetup, *, resume: Resume = False, allow_changes: bool = False, engine: RolloutEngine | None = None
) -> dict[str, Any]:
    """Run all remaining steps in this process; returns the summary. See `GRPOTrainer.train`.

    The caller opens the view and handles signals, as `GRPOTrainer.train` does.
    """
    world = setup.world
    with ExitStack() as stack:
        view = setup.view
        stack.enter_context(log_to(lambda text: None if view is None else view.note(text)))
        stack.enter_context(run_folder_owned(setup, resumes=bool(resume)))
        finished = world.broadcast_from_main(
            lambda: summary_of_finished_run(setup.config, setup.fingerprint) if resume is True else None
        )
        if finished is not None:
            logger.info(f"the run in {setup.config.logging.output_dir} is already finished: there is nothing to do")
            return finished
        resumption = world.broadcast_from_main(
            lambda: find_resumption(
                resume, setup.config, setup.store, inputs=setup.fingerprint, allow_changes=allow_changes
            )
        )
        pending = evaluation_is_due(setup, 0)
        ctx = stack.enter_context(open_run(setup, resumption, evaluation_pending=pending, engine=engine))
        with save_on_error(ctx):
            setup.on_ready()
            run(ctx)
        return write_final_files(ctx)


def run(ctx: RunContext) -> None:
    """All steps and evaluations that are left."""
    max_steps = ctx.setup.config.optim.max_steps
    for step in range(ctx.checkpoints.position.steps_done, max_steps):
        evaluate_and_save_if_due(ctx, step)
        with profiled(trace_path(ctx.setup.config.logging, step + 1, rank=ctx.setup.world.rank)):
            train_step(ctx, step)
    evaluate_and_save_if_due(ctx, max_steps)
    end_with_best_policy(ctx)


def train_step(ctx: RunContext, step: int) -> None:
    """One step: rollouts, rewards and advantages; gradients; the guards' decision; update; publish; record."""
    setup, learner, clock = ctx.setup, ctx.session.learner, Clock()
    batch = collect_batch(ctx.session.engine, setup.scorer, setup.sampler, setup.config, step=step, world=setup.world)
    clock.seconds |= {"rollout": batch.rollout_seconds, "reward": batch.reward_seconds}
    with clock.phase("train"):
        gradients = learner.backward(batch.trained)
        ctx.checkpoints.leave_position()
        decision = learner.guards.inspect(step, {**batch.metrics, **gradients.metrics()})
        update = learner.apply(decision, gradients, step=step)
    with clock.phase("publish"):
        ctx.session.publish()
    metrics = {**batch.metrics, **gradients.metrics(), **update.metrics}
    del gradients  # the packs and their log-probabilities
    record(ctx, step, batch, metrics, update, clock, is_complete=not decision.stop)
    if decision.stop_reason is not None:
        raise TrainingStoppedError(decision.stop_reason)


def record(
    ctx: RunContext,
    step: int,
    batch: Batch,
    metrics: dict[str, float],
    update: Update,
    clock: Clock,
    *,
    is_complete: bool,
) -> None:
    """Record and show a step. Once its metrics are written, a checkpoint of this step is valid."""
    checkpoints = ctx.checkpoints
    reports = exchange_reports(ctx.setup.world, ctx.session, clock.seconds, batch.groups)
    checkpoints.num_tokens += num_tokens(batch.groups)
    metrics = {
        **metrics,
        "num_tokens": float(checkpoints.num_tokens),
        "memory/resident_mib": resident_mib(),
        **time_metrics(reports, trained_tokens=metrics.get("packing/completion_tokens", 0.0)),
    }
    if ctx.output is not None:
        ctx.output.recorder.step(step + 1, metrics)
    if is_complete:
        checkpoints.set_position(step + 1, evaluation_pending=evaluation_is_due(ctx.setup, step + 1))
    if ctx.output is not None:
        ctx.output.show_step(step, batch.groups, metrics, slowest(reports), update.notes)


def evaluate_and_save_if_due(ctx: RunContext, step: int) -> None:
    """Between two steps, after `step` updates."""
    ctx.stop_if_requested()
    if ctx.checkpoints.position.evaluation_pending:
        evaluate_between_steps(ctx, step)
    save_steps = ctx.setup.config.checkpoint.save_steps
    if is_due(step, save_steps) or (step == ctx.setup.config.optim.max_steps and save_steps):
        ctx.checkpoints.save()
    ctx.stop_if_requested()


def evaluate_between_steps(ctx: RunContext, step: int) -> None:
    """Evaluate, and apply the guards' decision if the run evaluates while it trains."""
    evaluation, guards = evaluate_policy(ctx, step), ctx.session.learner.guards
    decision = None
    # A failed reward function says nothing about the policy.
    if ctx.setup.config.logging.eval_steps > 0 and not evaluation.failures:
        ctx.checkpoints.leave_position()
        decision = guards.inspect_evaluation(step, evaluation.rewards)
        guards.apply(decision)
        if decision.restore is not None:
            ctx.session.publish()
    record_evaluation(ctx, step, evaluation, "during" if step else "before")
    if decision is None or not decision.stop:
        ctx.checkpoints.set_position(step, evaluation_pending=False)
    for note in decision.notes if decision is not None else ():
        logger.info(note)
    if decision is not None and decision.stop_reason is not None:
        raise TrainingStoppedError(decision.stop_reason)


def end_with_best_policy(ctx: RunContext) -> None:
    """The final evaluation. If the reward has declined from its best, restore the best snapshot first."""
    max_steps, guards = ctx.setup.config.optim.max_steps, ctx.session.learner.guards
    last = None
    if ctx.setup.eval_prompts is not None and ctx.setup.config.logging.eval_steps > 0:
        last = evaluate_policy(ctx, max_steps)
    kind = guards.final_snapshot(None if last is None or last.failures else last.rewards)
    if kind is not None:
        ctx.checkpoints.save()  # the final state, before it is left
        if last is not None:
            record_evaluation(ctx, max_steps, last, "during")
            last = None
        ctx.checkpoints.leave_position()
        step = guards.restore(kind)
        ctx.session.publish()
        origin = f"before the update of step {step + 1}" if kind == "step" else f"the evaluation after step {step}"
        logger.info(f"the reward declined from its best: the run ends with the adapter from {origin}")
    if ctx.setup.eval_prompts is not None:
        record_evaluation(ctx, max_steps, last or evaluate_policy(ctx, max_steps), "after")


def evaluate_policy(ctx: RunContext, step: int) -> Evaluation:
    """Evaluate the current policy after `step` updates. A signal interrupts it immediately: it can be repeated."""
    setup = ctx.setup
    assert setup.eval_prompts is not None
    setup.stage(f"evaluating {len(setup.eval_prompts)} prompts")
    with setup.interrupts.interruptible():
        return evaluate(ctx.session.engine, setup.scorer, setup.eval_prompts, setup.config, step=step, world=setup.world)


def record_evaluation(ctx: RunContext, step: int, evaluation: Evaluation, when: When) -> None:
    """Record and show an evaluation after `step` updates."""
    if ctx.output is not None:
        ctx.output.evaluation(step, evaluation, when)


def evaluation_is_due(setup: RunSetup, steps_done: int) -> bool:
    """Whether to evaluate between two steps; after the last step, `end_with_best_policy` does."""
    logging = setup.config.logging
    if setup.eval_prompts is None or steps_done == setup.config.optim.max_steps:
        return False
    return is_due(steps_done, logging.eval_steps) if steps_done else logging.eval_before


def is_due(steps_done: int, every: int) -> bool:
    """Whether something that happens every so many steps is due; never for 0."""
    return every > 0 and steps_done % every == 0
