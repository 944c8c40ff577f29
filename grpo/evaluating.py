"""The evaluations of a run, between two steps when they are due, and the final one, which may restore an earlier policy; and
those that a user asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from .common.errors import TrainingStoppedError
from .common.log import logger
from .context import RunContext
from .data.prompts import Prompt
from .data.row_checks import check_rows
from .data.run_inputs import EvalSource, load_eval_prompts
from .display.view_text import When
from .experience.evaluation import Evaluation, evaluate
from .guards.evaluations import Rewards
from .prepared import check_eval_functions
from .run.evaluation_records import save_requested
from .run.notes import data_notes, evaluation_notes
from .setup import RunSetup
from .update.session import Session


def evaluate_between_steps(ctx: RunContext, step: int) -> Evaluation | None:
    """Evaluate, and apply the guards' decision if the run evaluates while it trains. Returns the evaluation, unless the policy
    is another one now."""
    evaluation, guards = evaluate_policy(ctx, step), ctx.session.learner.guards
    decision = None
    if ctx.setup.config.logging.eval_steps > 0:
        ctx.checkpoints.leave_position()
        decision = guards.inspect_evaluation(step, _evidence(ctx, evaluation))
        guards.apply(decision)
        if decision.restore is not None:
            ctx.session.publish()
    is_complete = decision is None or not decision.stop
    ctx.setup.callbacks.record_evaluation(evaluation, "during" if step else "before")
    if is_complete:  # before a user's callback can fail
        ctx.checkpoints.set_position(step, evaluation_pending=False)
    ctx.setup.callbacks.evaluate(evaluation.metrics())
    if is_complete:
        ctx.checkpoints.set_position(step, evaluation_pending=False)
    for note in decision.notes if decision is not None else ():
        logger.info(note)
    if decision is not None and decision.stop_reason is not None:
        raise TrainingStoppedError(decision.stop_reason)
    return None if decision is not None and decision.restore is not None else evaluation


def end_with_best_policy(ctx: RunContext, recorded: Evaluation | None) -> None:
    """The final evaluation. If the reward has declined from its best, restore the best snapshot first.

    recorded: an evaluation of the current policy that is recorded already.
    """
    steps_done, guards = ctx.checkpoints.position.steps_done, ctx.session.learner.guards
    last = recorded
    if last is None and ctx.setup.eval_prompts is not None and ctx.setup.config.logging.eval_steps > 0:
        last = evaluate_policy(ctx, steps_done)
    kind = guards.final_snapshot(None if last is None else _evidence(ctx, last))
    if kind is not None:
        ctx.checkpoints.save()  # the final state, before it is left
        if last is not None and recorded is None:
            record_evaluation(ctx, last, "during")
        last = recorded = None
        ctx.checkpoints.leave_position()
        step = guards.restore(kind)
        ctx.session.publish()
        origin = f"before the update of step {step + 1}" if kind == "step" else f"the evaluation after step {step}"
        logger.info(f"the reward declined from its best: the run ends with the adapter from {origin}")
    if recorded is not None:
        if ctx.output is not None:
            ctx.output.end_with(recorded)
    elif ctx.setup.eval_prompts is not None:
        record_evaluation(ctx, last or evaluate_policy(ctx, steps_done), "after")


def _evidence(ctx: RunContext, evaluation: Evaluation) -> Rewards | None:
    """The rewards of an evaluation; None if an outage of a reward function or an environment makes them no evidence about the
    policy."""
    if not evaluation.is_complete:
        return None
    return ctx.session.learner.guards.comparable(evaluation.prompt_rewards, evaluation.scored_shares)


def evaluate_policy(ctx: RunContext, step: int) -> Evaluation:
    """Evaluate the current policy after `step` updates. A signal interrupts it immediately: it can be repeated."""
    setup = ctx.setup
    assert setup.eval_prompts is not None
    setup.stage(f"evaluating {len(setup.eval_prompts)} prompts")
    with setup.interrupts.interruptible():
        return evaluate(
            ctx.session.engine,
            setup.scorer,
            setup.eval_prompts,
            setup.config,
            step=step,
            episodes=setup.episodes,
            trainer_state=setup.callbacks.state_for_rewards(),
            set_scorers=setup.set_scorers,
            world=setup.world,
        )


def record_evaluation(ctx: RunContext, evaluation: Evaluation, when: When) -> None:
    """Record and show an evaluation."""
    ctx.setup.callbacks.record_evaluation(evaluation, when)
    ctx.setup.callbacks.evaluate(evaluation.metrics())


def evaluation_is_due(setup: RunSetup, steps_done: int) -> bool:
    """Whether to evaluate between two steps; after the last step, `end_with_best_policy` does."""
    logging, requests = setup.config.logging, setup.callbacks.requests
    if setup.eval_prompts is None or steps_done == setup.config.optim.max_steps:
        return False
    if steps_done == 0:
        return logging.eval_before
    return not requests.stop and (requests.evaluate or is_due(steps_done, logging.eval_steps))


def is_due(steps_done: int, every: int) -> bool:
    """Whether something that happens every so many steps is due; never for 0."""
    return every > 0 and steps_done % every == 0


def prompts_of(setup: RunSetup, eval_dataset: EvalSource | None) -> Sequence[Prompt]:
    """The evaluation data, by default that of the run.

    Raises:
        ValueError, FileNotFoundError: there is none, or it is invalid.
    """
    if eval_dataset is not None:
        prompts = load_eval_prompts(setup.config, eval_dataset, setup.inputs)
        for note in data_notes("evaluation", prompts, setup.config.rollout.max_prompt_length):
            logger.info(note)
        check_eval_functions(prompts.rows, setup.scorer, setup.set_scorers, setup.episodes)
        check_rows(setup.scorer, prompts.rows, "evaluation data", setup.set_scorers)
        return prompts.rows
    if setup.eval_prompts is None:
        raise ValueError("no evaluation data: set data.eval, or pass eval_dataset")
    return setup.eval_prompts


def evaluate_now(
    setup: RunSetup, session: Session, prompts: Sequence[Prompt], adapter: Path | None, output_file: Path | None = None
) -> dict[str, float]:
    """Evaluate outside of the loop: the current policy, or a saved adapter; returns the metrics. See `GRPOTrainer.evaluate`."""
    setup.stage(f"evaluating {len(prompts)} prompts")
    step = setup.callbacks.state.global_step
    with nullcontext() if adapter is None else _adapter_in_place(session, adapter):
        state = setup.callbacks.state_for_rewards()
        evaluation = evaluate(
            session.engine,
            setup.scorer,
            prompts,
            setup.config,
            step=step,
            episodes=setup.episodes,
            trainer_state=state,
            set_scorers=setup.set_scorers,
        )
    if output_file is not None:
        save_requested(output_file, evaluation, setup.config, step=step, adapter=adapter)
    for note in evaluation_notes(evaluation):
        logger.warning(note)
    if adapter is None:
        setup.callbacks.evaluate(evaluation.metrics(), is_of_run=False)
    return evaluation.metrics()


@contextmanager
def _adapter_in_place(session: Session, adapter: Path) -> Iterator[None]:
    """The policy with the weights of a saved adapter inside the block."""
    masters = session.policy.masters
    current = [master.detach().clone() for master in masters]
    session.policy.load_adapter(adapter)
    session.publish()
    try:
        yield
    finally:
        with torch.no_grad():
            for master, weight in zip(masters, current, strict=True):
                master.copy_(weight)
        session.publish()
