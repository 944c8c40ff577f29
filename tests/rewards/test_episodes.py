"""Built-in rewards on conversations of several turns: they read the assistant's last message, no result and no user's turn."""

from __future__ import annotations

from typing import Any

import pytest

from rankup.rewards import answers, formats, lengths, mathematics, repetition
from rankup.rewards.contract import Inputs, call
from rankup.rewards.texts import text_of

ADD = {"type": "function", "function": {"name": "add", "arguments": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [ADD]}
RESULT = {"role": "tool", "name": "add", "content": "42"}
ANSWER = {"role": "assistant", "content": "So it is 7."}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([CALL, RESULT, ANSWER], "So it is 7."),
        ([CALL, RESULT], ""),
        ([ANSWER, RESULT], "So it is 7."),
        ([ANSWER, {"role": "user", "content": "higher"}], "So it is 7."),
        ([ANSWER, CALL], ""),
        ([{"role": "assistant"}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "7"}]}, RESULT], "7"),
        ([RESULT], ""),
        ([], ""),
        ("7", "7"),
    ],
)
def test_the_text_of_an_episode_is_that_of_the_assistant_s_last_message(messages: Any, text: str) -> None:
    assert text_of(messages) == text


@pytest.mark.parametrize(
    ("reward", "columns", "expected"),
    [
        (answers.last_integer, {"answer": [42, 42, 42]}, [0.0, 0.0, 0.0]),
        (answers.last_integer, {"answer": [7, 7, 7]}, [1.0, 1.0, 0.0]),
        (formats.matches("So it is .*"), {}, [1.0, 1.0, 0.0]),
        (formats.think_format, {}, [0.0, 0.0, 0.0]),
        (repetition.repetition_penalty(ngram=1, max_penalty=-1.0), {}, [0.0, 0.0, 0.0]),
        (mathematics.math_verify, {"answer": ["42", "42", "42"]}, [0.0, 0.0, 0.0]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_results_of_tools_answer_nothing(reward: Any, columns: dict[str, list[Any]], expected: list[float]) -> None:
    completions = [[CALL, RESULT, ANSWER], [ANSWER, RESULT], [CALL, RESULT]]
    inputs = Inputs(prompts=["?"] * 3, completions=completions, completion_ids=[[1]] * 3, columns=columns)
    assert call("reward", reward, inputs).rewards == expected


def test_lengths_are_those_of_the_sampled_tokens() -> None:
    inputs = Inputs(
        prompts=["?"] * 2, completions=["a", "b"], completion_ids=[[1] * 10, [1] * 4], sampled_lengths=[4, 4]
    )
    assert call("length", lengths.target_length(4), inputs).rewards == [1.0, 1.0]
    assert call("length", lengths.soft_overlong(10, cache_tokens=5), inputs).rewards == [0.0, 0.0]
    whole = Inputs(prompts=["?"], completions=["a"], completion_ids=[[1] * 10])
    assert call("length", lengths.soft_overlong(10, cache_tokens=5), whole).rewards == [-1.0]


def test_lengths_are_split_with_their_rows() -> None:
    inputs = Inputs(
        prompts=["?"] * 3,
        completions=["a", "b", "c"],
        completion_ids=[[1]] * 3,
        sampled_lengths=[1, 0, 1],
        environments=["x", "y", "z"],
    )
    parts = inputs.split(2)
    assert [part.sampled_lengths for part in parts] == [[1, 0], [1]]
    assert [part.environments for part in parts] == [["x", "y"], ["z"]]
    with pytest.raises(ValueError, match="environments has 1 values for 2 completions"):
        Inputs(prompts=["?"] * 2, completions=["a"] * 2, completion_ids=[[1]] * 2, environments=["x"])
