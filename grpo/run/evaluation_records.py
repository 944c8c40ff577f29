"""Evaluations as records, and into files (`evaluation_files.py`).

    record = record_of(evaluation, config, step=20, when="during")
    record.prompts[0].texts
    save_own(Path("runs/mine"), evaluation, config, step=20, when="during")     # runs/mine/evaluations/step_000020.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...rewards.logged import EXTRACTED_ANSWER, plain
from ..algorithm.estimates import Estimate
from ..common.exact_json import encode
from ..config import GRPOConfig, eval_sampling
from ..data.groups import Group
from ..display.view_text import When
from ..experience.evaluation import Evaluation
from .evaluation_files import EVALUATIONS, EvaluationRecord, PromptResult, SetResult, own_name, write_evaluation


def save_own(run_dir: Path, evaluation: Evaluation, config: GRPOConfig, *, step: int, when: When) -> None:
    """Write the file of a run's own evaluation after `step` steps."""
    write_evaluation(run_dir / EVALUATIONS / own_name(step, when), record_of(evaluation, config, step=step, when=when))


def save_requested(
    path: Path, evaluation: Evaluation, config: GRPOConfig, *, step: int, adapter: Path | None
) -> None:
    """Write the file of an evaluation that a user has asked for. `adapter`: that was evaluated instead of the policy."""
    write_evaluation(path, record_of(evaluation, config, step=step, adapter=adapter))


def record_of(
    evaluation: Evaluation, config: GRPOConfig, *, step: int, when: When | None = None, adapter: Path | None = None
) -> EvaluationRecord:
    """The record of an evaluation. `step`: updates done, unless a saved adapter was evaluated."""
    model = config.model
    about = {
        "model": model.name,
        "adapter": config.lora.start_from if adapter is None else str(adapter),
        "run": config.logging.run_name,
        "step": None if adapter is not None else step,
        "when": when,
    }
    settings = {
        "sampling": eval_sampling(config).model_dump(mode="json"),
        "seed": config.seed,
        "pass_reward": config.data.eval_pass_reward,
        "engine": config.rollout.engine,
        "dtype": model.dtype,
        "load_in": model.load_in,
        "data": config.data.model_dump(mode="json")["eval"],
    }
    return EvaluationRecord(
        about=about,
        settings=settings,
        metrics=evaluation.metrics(),
        all=_set_result(evaluation, evaluation.groups, evaluation.estimates, None),
        sets={
            name: _set_result(evaluation, groups, evaluation.set_estimates[name], name)
            for name, groups in evaluation.sets.items()
        },
        prompts=[_prompt_result(group) for group in evaluation.groups],
    )


def prompt_hash(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Identifies a prompt by its text or its messages, whatever model and chat template it is for."""
    text = content if isinstance(content, str) else encode(content, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _set_result(
    evaluation: Evaluation, groups: Sequence[Group], estimates: Mapping[str, Estimate], name: str | None
) -> SetResult:
    return SetResult(
        prompts=len(groups),
        completions=sum(len(group.completions) for group in groups),
        estimates=dict(estimates),
        functions=evaluation.function_means(name),
    )


def _prompt_result(group: Group) -> PromptResult:
    answers = group.scores.extras.get(EXTRACTED_ANSWER)
    return PromptResult(
        eval_set=group.prompt.eval_set,
        hash=prompt_hash(group.prompt.content),
        prompt=plain(group.prompt.content),
        rewards=group.scores.total,
        texts=[plain(completion.text) for completion in group.completions],
        answers=None if answers is None else plain(answers),
        functions=group.scores.by_function,
    )
