"""A built-in reward for the tasks of Reasoning Gym, using each task's scorer.

    data: {train: "reasoning_gym:countdown"}
    rewards:
      functions:
        - {function: "rankup.rewards.reasoning:reasoning_gym_score", kwargs: {}}

Many tasks have several correct answers, or give partial credit, so comparing with `answer` would be wrong.

**Some scorers evaluate the completion as Python code**: in version 0.1.25 those of binary_matrix, n_queens, spiral_matrix
and string_insertion, and through SymPy's parser countdown, puzzle24, polynomial_multiplication and the integrals. Such a
completion can also compute forever. Run the reward with `isolation: process` and limits, or in a sandbox.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .contract import with_check
from .texts import Completion, Function, content_text, describe, did_you_mean, with_prefixes

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BOARD_TASKS = ("arc_agi", "rearc")


def reasoning_gym_score(task: str | None = None, *, options: Mapping[str, Any] | None = None) -> Function:
    """Make a reward: the score, at most 1.0, that a task of Reasoning Gym gives the completion.

    The answer is the content of the last `<answer>...</answer>` in the completion, or else the complete text, without
    surrounding white space; `<answer>` at the end of the prompt counts as the beginning of the completion. The data needs the
    columns of `reasoning_gym:<task>`: answer, metadata and, without the argument `task`, also task. A row whose metadata is
    None gets None.

    task: the task of all rows; None: the column `task` of each row. options: the options that the data was made with, for
    the tasks whose scorer depends on them (decimal_arithmetic, polynomial_equations, puzzle24, time_intervals, word_ladder);
    None: the task's defaults. They are allowed only with `task`.

    If a scorer fails on a completion, the reward is 0.0; the share of such rows is logged as `reasoning_gym/scorer_failed`.

    Raises ValueError for an unknown task and for invalid options. The reward raises ValueError, naming the row, if the
    metadata is not a JSON object, or if the scorer fails on the row's correct answer too.
    """
    if task is None and options:
        raise ValueError("reasoning_gym_score accepts options only together with a task: name the task that they belong to")
    settings = json.dumps(dict(options or {}), sort_keys=True)  # text: it is part of a cache's key

    def by_row(
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        answer: Sequence[str | None],
        metadata: Sequence[Any],
        task: Sequence[str],
        completion_prefixes: Sequence[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        scores: list[float | None] = []
        failed = 0
        texts = with_prefixes(completions, completion_prefixes, lambda tag: tag == "<answer>")
        rows = zip(prompts, texts, answer, metadata, task, strict=True)
        for row, (prompt, text, right, facts, name) in enumerate(rows):
            if facts is None:
                scores.append(None)
                continue
            metadata_of_row = _read_metadata(facts, f"the metadata of row {row}", name)
            entry = {"question": _question_of(prompt), "answer": right, "metadata": metadata_of_row}
            score = _score(_scorer(name, settings), _answer_in(text), entry, f"row {row} ({name})")
            failed += score is None
            scores.append(score or 0.0)
        if log_metric is not None and scores:
            log_metric("reasoning_gym/scorer_failed", failed / len(scores))
        return scores

    def with_task(
        prompts: Sequence[Completion], completions: Sequence[Completion], answer: Sequence[str | None],
        metadata: Sequence[Any], completion_prefixes: Sequence[str] | None = None, **kwargs: Any,
    ) -> list[float | None]:  # fmt: skip
        more = {**kwargs, "completion_prefixes": completion_prefixes, "task": [task] * len(completions)}
        return by_row(prompts, completions, answer, metadata, **more)

    if task is not None:
        _scorer(task, settings)
    reward = by_row if task is None else with_task
    reward.__name__ = "reasoning_gym_score"
    return with_check(_metadata_check(task, settings))(reward)


def _metadata_check(task: str | None, settings: str) -> Callable[..., None]:
    """A `check_row` for rows of the task, or of the task in their column."""
    of_all = task

    def check_metadata(metadata: Any, task: str = "", **columns: Any) -> None:
        if metadata is not None:
            _scorer(of_all or task, settings)
            _read_metadata(metadata, "the metadata", of_all or task)

    return check_metadata


def _score(scorer: Callable[[Any, dict[str, Any]], Any], answer: str, entry: dict[str, Any], where: str) -> float | None:
    """The task's score of the answer; None if its scorer fails on this answer, but not on the correct one."""
    try:
        return float(scorer(answer, entry))
    except Exception:  # scorers parse the model's text, and may raise anything if they cannot
        if entry["answer"] is not None:  # a few tasks have only a scorer, no answer
            try:
                scorer(entry["answer"], entry)
            except Exception as error:  # so the completion is not the cause
                raise ValueError(
                    f"the scorer of {where} fails on the row's correct answer: {describe(error)}. Rows need the metadata "
                    "that the task made them with, and a task with options needs the same options here"
                ) from error
        return None


def _read_metadata(metadata: Any, subject: str, task: str) -> dict[str, Any]:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise ValueError(f"{subject} is not JSON: {error}") from error
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{subject} is a {type(metadata).__name__}: it must be a JSON object")
    if task in _BOARD_TASKS and "output" in metadata:
        # These two compare with a tuple of tuples, which JSON has turned into lists; all others accept lists.
        return {**metadata, "output": tuple(tuple(line) for line in metadata["output"])}
    return dict(metadata)


def _question_of(prompt: Completion) -> str:
    """The text itself, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else content_text(prompt[-1].get("content"))


def _answer_in(text: str) -> str:
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()


@functools.cache
def _scorer(task: str, settings: str) -> Callable[[Any, dict[str, Any]], Any]:
    """The task's scorer; cached, since creating a task may read data for seconds."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        suggestion = did_you_mean(task, DATASETS)
        raise ValueError(f"reasoning_gym has no task {task!r}" + (f": {suggestion}" if suggestion else ""))
    try:
        return create_dataset(task, **json.loads(settings)).score_answer
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task} refuses its options: {error}") from error
