"""The loop. Read it from top to bottom.

    setup = prepare_run(config, UserInputs(), view=view)
    summary = train(setup, Sessions(setup), resume=True)

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
from .common.timing import Clock
from .context import RunContext, open_run, run_folder_owned
from .ending import save_on_error, write_final_files
from .evaluating import Evaluation, end_with_best_policy, evaluate_between_steps, evaluation_is_due, is_due
from .experience.batch import Batch, collect_batch
from .experience.outage import Outage
from .recording import record_step
from .run.reporting import check_reports
from .sessions import Sessions
from .setup import RunSetup


def train(
    setup: RunSetup,
    sessions: Sessions,
    *,
    resume: Resume = False,
    allow_changes: bool = False,
    engine: RolloutEngine | None = None,
) -> dict[str, Any]:
    """Run all remaining steps in this process; returns the summary. See `GRPOTrainer.train`.

    The caller opens the view and handles signals, as `GRPOTrainer.train` does.
    """
    world = setup.world
    check_reports(setup.config.logging.report_to)
    with ExitStack() as stack:
        view = setup.view
        stack.enter_context(log_to(lambda text: None if view is None else view.note(text)))
        stack.enter_context(run_folder_owned(setup, resumes=bool(resume)))
        finished = world.broadcast_from_main(
            lambda: summary_of_finished_run(setup.config, setup.fingerprint) if resume is True else None
        )
        if finished is not None:
            logger.info(f"the run in {setup.config.logging.output_dir} is already finished: there is nothing to do")
            sessions.take_finished_run()
            return finished
        resumption = world.broadcast_from_main(
            lambda: find_resumption(
                resume, setup.config, setup.store, inputs=setup.fingerprint, allow_changes=allow_changes
            )
        )
        pending = evaluation_is_due(setup, 0)
        ctx = stack.enter_context(open_run(setup, sessions, resumption, evaluation_pending=pending, engine=engine))
        with save_on_error(ctx):
            setup.on_ready()
            begin(ctx)
            run(ctx)
        summary = write_final_files(ctx)
        setup.callbacks.end(world.broadcast_from_main(lambda: summary["seconds"]["total"]))
        return summary


def begin(ctx: RunContext) -> None:
    """Tell the callbacks where the run starts."""
    setup, session = ctx.setup, ctx.session
    rows = setup.world.broadcast_from_main(lambda: [] if ctx.output is None else ctx.output.recorder.rows())
    setup.callbacks.begin(
        ctx.checkpoints.position.steps_done,
        rows,
        model=session.policy.peft_model,
        tokenizer=setup.inputs.tokenizer,
        optimizer=session.learner.optimizer,
        inside=ctx.inside,
    )


def run(ctx: RunContext) -> None:
    """All steps and evaluations that are left, unless a callback ends the training."""
    max_steps, evaluation, outage = ctx.setup.config.optim.max_steps, None, Outage(ctx.setup.config.rewards)
    for step in range(ctx.checkpoints.position.steps_done, max_steps):
        evaluation = evaluate_and_save_if_due(ctx, step)
        if ctx.setup.callbacks.requests.stop:
            break
        outage.stop_if_too_long(train_step(ctx, step))
    else:
        evaluation = evaluate_and_save_if_due(ctx, max_steps)
    end_with_best_policy(ctx, evaluation)


def train_step(ctx: RunContext, step: int) -> Batch:
    """One step: rollouts, rewards and advantages; gradients; the guards' decision; update; publish; record."""
    setup, learner, clock = ctx.setup, ctx.session.learner, Clock()
    setup.callbacks.step_begin(step)
    batch = collect_batch(
        ctx.session.engine,
        setup.scorer,
        setup.sampler,
        setup.config,
        functions=setup.functions,
        step=step,
        episodes=setup.episodes,
        trainer_state=setup.callbacks.state_for_rewards(),
        world=setup.world,
    )
    clock.seconds |= {"rollout": batch.rollout_seconds, "reward": batch.reward_seconds}
    with clock.phase("train"):
        ctx.session.engine.suspend()  # whatever samples next resumes it
        gradients = learner.backward(batch.trained)
        ctx.checkpoints.leave_position()
        decision = learner.guards.inspect(step, {**batch.metrics, **gradients.metrics()})
        update = learner.apply(decision, gradients, step=step)
        setup.callbacks.optimizer_step()
    with clock.phase("publish"):
        ctx.session.publish()
    metrics = {**batch.metrics, **gradients.metrics(), **update.metrics}
    del gradients  # the packs and their log-probabilities
    batch = batch.without_experts()
    record_step(ctx, step, batch, metrics, update, clock, is_complete=not decision.stop)
    if decision.stop_reason is not None:
        raise TrainingStoppedError(decision.stop_reason)
    return batch


def evaluate_and_save_if_due(ctx: RunContext, step: int) -> Evaluation | None:
    """Between two steps, after `step` updates. Returns the evaluation of the policy, if there was one."""
    ctx.stop_if_requested()
    evaluation = evaluate_between_steps(ctx, step) if ctx.checkpoints.position.evaluation_pending else None
    save_steps, requests = ctx.setup.config.checkpoint.save_steps, ctx.setup.callbacks.requests
    is_last = requests.stop or step == ctx.setup.config.optim.max_steps
    is_wanted = requests.save or is_due(step, save_steps) or (is_last and save_steps > 0)
    if is_wanted and not ctx.checkpoints.is_saved:
        ctx.checkpoints.save()
        if ctx.checkpoints.is_saved:
            ctx.setup.callbacks.save()
    ctx.stop_if_requested()
    return evaluation
