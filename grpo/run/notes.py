"""Notes for the user in addition to a run's metrics: before the first step, and after a step that had problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...kernels.device import native_dtype
from ..algorithm.corrections import sampling_warnings
from ..config import GRPOConfig
from ..config.trl.batch import effective_step
from ..data.groups import Group
from ..data.run_inputs import RunInputs
from ..experience.evaluation import Evaluation
from ..experience.step_metrics import failures, has_reward, scored_shares
from ..model.start import describe_start
from ..update.ranks import describe


def start_notes(config: GRPOConfig, inputs: RunInputs) -> Iterator[str]:
    """Notes about the run before it starts."""
    rollout = config.rollout
    yield from config.notes
    if config.has_trl_batch:
        yield effective_step(
            prompts=config.optim.prompts_per_step,
            generations=rollout.num_generations,
            iterations=config.algorithm.num_iterations,
            max_steps=config.optim.max_steps,
        )
    yield from describe_start(config, inputs.model_path)
    yield from describe(config)
    if config.model.dtype == "bfloat16" and native_dtype() == "float32":
        yield "this CPU has no bf16 instructions and emulates them: model.dtype=float32 is many times faster here"
    yield from sampling_warnings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
    )
    for name, prompts in (("training", inputs.train_prompts), ("evaluation", inputs.eval_prompts)):
        if prompts is not None and prompts.dropped:
            total, limit = prompts.dropped + len(prompts.rows), rollout.max_prompt_length
            yield f"{prompts.dropped} of {total} {name} prompts are longer than {limit} tokens and were dropped"


def step_notes(step: int, groups: Sequence[Group]) -> Iterator[str]:
    """Which reward functions failed, and which completions have no reward. `step`: updates done before it."""
    for name, reasons in failures(groups).items():
        yield f"step {step + 1}: reward function {name!r} failed on {len(reasons)} completions: {reasons[0]}"
    unscored = sum(
        reward is None and not any(errors[row] for errors in group.scores.errors.values())
        for group in groups
        for row, reward in enumerate(group.scores.total)
    )
    names = ", ".join(groups[0].scores.by_function)
    if not any(has_reward(group) for group in groups):
        yield (
            f"step {step + 1}: no completion has a reward (functions: {names}): nothing is learned, and the step says nothing "
            "about the policy"
        )
    elif unscored:
        yield f"step {step + 1}: no reward function applied to {unscored} completions ({names}): nothing is learned from them"
    silent = [name for name, share in scored_shares(groups).items() if share == 0.0 and name not in failures(groups)]
    if silent and any(has_reward(group) for group in groups):
        yield f"step {step + 1}: no reward of {', '.join(silent)}: the sum is that of the other functions"


def evaluation_notes(evaluation: Evaluation) -> Iterator[str]:
    """Which reward functions failed on the evaluation data."""
    for name, reasons in evaluation.failures.items():
        yield f"evaluation: reward function {name!r} failed on {len(reasons)} completions: {reasons[0]}"
