"""A built-in reward for the tasks of Reasoning Gym, by the task's own scorer.

    data: {train: "reasoning_gym:countdown"}
    rewards:
      functions:
        - {function: "rankup.rewards.reasoning:reasoning_gym_score", kwargs: {}}

Many tasks have several right answers, or give part of the credit, so comparing with `answer` would be wrong.

**Some scorers evaluate the completion as Python code**: in version 0.1.25 those of binary_matrix, n_queens, spiral_matrix
and string_insertion, and through SymPy's parser countdown, puzzle24, polynomial_multiplication and the integrals. Such a
completion can also compute for ever. Run the reward under `isolation: process` with limits, or in a sandbox.
"""

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .texts import Completion, RewardFunction, text_of

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BOARD_TASKS = ("arc_agi", "rearc")


def reasoning_gym_score(task: str | None = None, *, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """Make a reward: the score, at most 1.0, that a task of Reasoning Gym gives the completion.

    The answer is what stands in the last `<answer>...</answer>` of the completion, or else the whole of it, white space
    around it aside. The data needs the columns of `reasoning_gym:<task>`: answer, metadata and, without `task` here,
    task. A row whose metadata is None gets None.

    task: the task of all rows; by default each row names its own. options: what the data was made with, for the tasks
    whose scorer looks at it (decimal_arithmetic, polynomial_equations, puzzle24, time_intervals, word_ladder); by default
    the task's own defaults. They are only taken with `task`.

    Where a scorer fails on a completion, that is 0.0; the share of such rows is logged as `reasoning_gym/scorer_failed`.

    Raises ValueError for an unknown task and for options that the task refuses. The reward raises ValueError, naming
    the row, where the metadata is no JSON object, or where the scorer fails on the row's own answer too.
    """
    if task is None:
        if options:
            raise ValueError("reasoning_gym_score takes options only with a task: name the task that they belong to")

        def reward_by_row(
            prompts: Sequence[Completion],
            completions: Sequence[Completion],
            answer: Sequence[str | None],
            metadata: Sequence[Any],
            task: Sequence[str],
            **kwargs: Any,
        ) -> list[float | None]:
            rows = zip(prompts, completions, answer, metadata, task, strict=True)
            return _score_rows(rows, "{}", kwargs.get("log_metric"))

        reward_by_row.__name__ = "reasoning_gym_score"
        return reward_by_row

    settings = json.dumps(dict(options or {}), sort_keys=True)  # text: it is part of a cache's key
    _scorer(task, settings)

    def reward(
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        answer: Sequence[str | None],
        metadata: Sequence[Any],
        **kwargs: Any,
    ) -> list[float | None]:
        rows = zip(prompts, completions, answer, metadata, [task] * len(completions), strict=True)
        return _score_rows(rows, settings, kwargs.get("log_metric"))

    reward.__name__ = "reasoning_gym_score"
    return reward


def _score_rows(
    rows: Iterable[tuple[Completion, Completion, str | None, Any, str]],
    settings: str,
    log_metric: Callable[[str, float], None] | None,
) -> list[float | None]:
    scores: list[float | None] = []
    failed = 0
    for row, (prompt, completion, answer, metadata, task) in enumerate(rows):
        if metadata is None:
            scores.append(None)
            continue
        entry = {"question": text_of(prompt), "answer": answer, "metadata": _read_metadata(metadata, row, task)}
        score = _score(_scorer(task, settings), _answer_in(text_of(completion)), entry, f"row {row} ({task})")
        failed += score is None
        scores.append(score or 0.0)
    if log_metric is not None and scores:
        log_metric("reasoning_gym/scorer_failed", failed / len(scores))
    return scores


def _score(scorer: Callable[[Any, dict[str, Any]], Any], given: str, entry: dict[str, Any], where: str) -> float | None:
    """The task's score of the answer; None where its scorer fails on this answer, but not on the right one."""
    try:
        return float(scorer(given, entry))
    except Exception:  # scorers take the model's text apart, and whatever one raises says that it could not
        if entry["answer"] is not None:  # a few tasks have no answer of their own, only a scorer
            try:
                scorer(entry["answer"], entry)
            except Exception as error:  # then it is not the completion that is wrong
                raise ValueError(
                    f"the scorer of {where} fails on the row's own answer: {type(error).__name__}: {error}. Rows need the "
                    "metadata that the task made them with, and a task with options needs the same ones here"
                ) from error
        return None


def _read_metadata(metadata: Any, row: int, task: str) -> dict[str, Any]:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise ValueError(f"the metadata of row {row} is not JSON: {error}") from error
    if not isinstance(metadata, Mapping):
        raise ValueError(f"the metadata of row {row} is a {type(metadata).__name__}: it must be a JSON object")
    if task in _BOARD_TASKS and "output" in metadata:
        # These two compare with a tuple of tuples, which JSON has turned into lists; all others take lists.
        return {**metadata, "output": tuple(tuple(line) for line in metadata["output"])}
    return dict(metadata)


def _answer_in(text: str) -> str:
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()


@functools.cache
def _scorer(task: str, settings: str) -> Callable[[Any, dict[str, Any]], Any]:
    """The task's scorer; cached, since some tasks read their data for seconds when they are made."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        offer = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"reasoning_gym has no task {task!r}{offer}")
    try:
        return create_dataset(task, **json.loads(settings)).score_answer
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task} refuses its options: {error}") from error
