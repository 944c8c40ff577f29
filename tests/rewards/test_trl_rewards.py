"""Functions written for TRL run unmodified: those of TRL, and the styles in which people write theirs."""

import asyncio
import functools
import importlib
from typing import Any

import pytest
from scored import scorer_of

from rankup.rewards import Inputs, RewardFunction, load_object

# ------------------------------------------------------------------------------------------ TRL's functions

TEXTS = [
    r"\boxed{\frac{1}{3}}",
    r"My answer is \boxed{\frac{1}{2}}",
    r"<think>one third</think> The answer is \boxed{\frac{1}{3}}.",
    r"<think>one third</think> The answer is \boxed{0.5}.",
    r"<think>It could be \boxed{\frac{1}{3}}",
    "<think>one</think><think>two</think> three",
    "",
    "no answer at all",
    r"$\frac{2}{6}$",
    r"<think>\boxed{4}</think> \boxed{\frac{1}{3}} or \boxed{5}",
    "the the the the the the the the",
    "</think>" + r"\boxed{\frac{1}{3}}",
]
SOLUTIONS = [r"\frac{1}{3}"] * 11 + ["no formula"]
IDS = [list(range(length)) for length in range(1, 7)] + [[5] * length for length in (0, 3, 8, 10, 11, 40)]

TRL = importlib.import_module("trl.rewards")

# Factories need arguments, so these are the functions that they return.
MADE = {
    "get_cosine_scaled_reward": TRL.get_cosine_scaled_reward(max_len=12),
    "get_repetition_penalty_reward": TRL.get_repetition_penalty_reward(ngram_size=2, max_penalty=-0.5),
    "get_soft_overlong_punishment": TRL.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4),
}
NAMES = sorted(name for name in TRL.__all__ if callable(getattr(TRL, name)))


def inputs_of(completions: list[Any] | None = None, **columns: list[Any]) -> Inputs:
    """Completions with their columns; without any, TRL's kind of task, in which completions are conversations."""
    if completions is None:
        completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
        columns, ids = {"solution": SOLUTIONS, "unused": [1] * len(TEXTS)}, IDS
    else:
        ids = [[1] * len(completion) for completion in completions]
    prompts = [f"p{row}" for row in range(len(completions))]
    return Inputs(
        prompts=prompts, completions=completions, completion_ids=ids, columns=columns, trainer_state={"global_step": 7}
    )


def called_directly(function: Any) -> tuple[list[float | None], dict[str, list[Any]]]:
    inputs = inputs_of()
    extras: dict[str, list[Any]] = {}
    rewards = function(
        prompts=inputs.prompts,
        completions=inputs.completions,
        completion_ids=inputs.completion_ids,
        log_extra=extras.__setitem__,
        log_metric=None,
        trainer_state=None,
        **inputs.columns,
    )
    return rewards, extras


def test_all_of_them_are_covered():
    assert len(NAMES) >= 6
    assert {name for name in NAMES if name.startswith("get_")} == set(MADE)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_trl_returns_the_same_as_in_a_direct_call(name):
    spec = MADE.get(name, f"trl.rewards:{name}")
    expected, extras = called_directly(MADE.get(name) or load_object(f"trl.rewards:{name}"))
    assert len(set(expected)) > 1
    scores = scorer_of(spec).score(inputs_of())
    assert list(scores.by_function.values()) == [expected]
    assert scores.extras == extras


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_factory_of_trl_accepts_its_arguments(name):
    kwargs = {
        "get_cosine_scaled_reward": {"max_len": 12},
        "get_repetition_penalty_reward": {"ngram_size": 2, "max_penalty": -0.5},
        "get_soft_overlong_punishment": {"max_completion_len": 10, "soft_punish_cache": 4},
    }
    scores = scorer_of(RewardFunction(function=f"trl.rewards:{name}", kwargs=kwargs[name])).score(inputs_of())
    assert scores.by_function == {MADE[name].__name__: called_directly(MADE[name])[0]}


def test_all_of_them_together():
    scores = scorer_of([MADE.get(name, f"trl.rewards:{name}") for name in NAMES]).score(inputs_of())
    assert len(scores.by_function) == len(NAMES)
    columns = list(scores.by_function.values())
    for row, total in enumerate(scores.total):
        expected = sum(value for column in columns if (value := column[row]) is not None)
        assert total == pytest.approx(expected)


# ------------------------------------------------------------------------------------------ as people write theirs


def by_column(completions, answer, **kwargs):
    return [1.0 if text == right else 0.0 for text, right in zip(completions, answer, strict=True)]


def by_tokens(prompts, completions, completion_ids, **kw):
    return [float(len(prompt) + len(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def only_completions(completions):
    return [len(text) for text in completions]


def only_keywords(**kwargs):
    return [float(len(text)) for text in kwargs["completions"]]


async def awaited(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return by_column(completions, answer)


def scaled(completions, factor, answer, **kwargs):
    return [factor * reward for reward in by_column(completions, answer)]


class Threshold:
    def __init__(self, length):
        self.length = length

    def __call__(self, completions, **kwargs):
        return [float(len(text) >= self.length) for text in completions]


class AwaitedThreshold(Threshold):
    async def __call__(self, completions, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(completions)


def not_for_all(completions, level, **kwargs):
    return [None if level == "hard" else 1.0 for level in level]


def by_progress(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)


def logging(completions, answer, log_extra=None, log_metric=None, **kwargs):
    rewards = by_column(completions, answer)
    if log_extra:
        log_extra("right_answer", list(answer))
    if log_metric:
        log_metric("share_right", sum(rewards) / len(rewards))
    return rewards


def numpy_numbers(completions, **kwargs):
    import numpy as np

    return np.array([len(text) for text in completions], dtype=np.float32)


@pytest.mark.parametrize(
    ("function", "rewards"),
    [
        (by_column, [1.0, 0.0, 1.0]),
        (by_tokens, [3.0, 4.0, 5.0]),
        (only_completions, [1.0, 2.0, 3.0]),
        (only_keywords, [1.0, 2.0, 3.0]),
        (awaited, [1.0, 0.0, 1.0]),
        (functools.partial(scaled, factor=2.0), [2.0, 0.0, 2.0]),
        (functools.partial(awaited), [1.0, 0.0, 1.0]),
        (Threshold(2), [0.0, 1.0, 1.0]),
        (AwaitedThreshold(3), [0.0, 0.0, 1.0]),
        (not_for_all, [1.0, None, 1.0]),
        (by_progress, [7.0] * 3),
        (logging, [1.0, 0.0, 1.0]),
        (numpy_numbers, [1.0, 2.0, 3.0]),
        (lambda completions, **kwargs: [0.5 for _ in completions], [0.5] * 3),
    ],
)
def test_styles(function, rewards):
    columns = {"answer": ["a", "b", "ccc"], "level": ["easy", "hard", "easy"]}
    scores = scorer_of(function).score(inputs_of(["a", "bb", "ccc"], **columns))
    assert list(scores.by_function.values()) == [rewards]
    assert scores.total == rewards
    if function is logging:
        assert scores.extras == {"right_answer": ["a", "b", "ccc"]}
        assert scores.metrics == {"share_right": pytest.approx(2 / 3)}


def test_styles_side_by_side():
    functions = [by_column, awaited, not_for_all, AwaitedThreshold(3)]
    columns = {"answer": ["a", "x"], "level": ["hard", "hard"]}
    scores = scorer_of(functions, weights=[1.0, 0.5, 4.0, 2.0]).score(inputs_of(["a", "bbb"], **columns))
    assert list(scores.by_function) == ["by_column", "awaited", "not_for_all", "AwaitedThreshold"]
    assert scores.total == [1.5, 2.0]
