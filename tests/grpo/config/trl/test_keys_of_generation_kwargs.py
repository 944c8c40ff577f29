"""A key of `generation_kwargs` that is an option here becomes that option, unless both are set and differ."""

from __future__ import annotations

from typing import Any

import pytest

from rankup.grpo.config import GRPOConfig
from rankup.rollout.generation_kwargs import GenerationKwargs

SAME_VALUES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stop": ["a"], "generation_kwargs": {"stop": "a"}}, {"stop": ["a"]}),
    ({"top_k": -1, "generation_kwargs": {"top_k": 0}}, {"top_k": -1}),
    ({"temperature": 0.5, "generation_kwargs": {"temperature": None}}, {"temperature": 0.5}),
    ({"temperature": "0.5", "generation_kwargs": {"temperature": 0.5}}, {"temperature": 0.5}),
    ({"generation_kwargs": {"min_tokens": 3, "min_new_tokens": 3}}, {"generation_kwargs": GenerationKwargs(min_tokens=3)}),
    # TRL's batch has a default of 512 tokens
    ({"per_device_train_batch_size": 8, "generation_kwargs": {"max_tokens": 9}}, {"max_completion_length": 9}),
]


@pytest.mark.parametrize(("script", "expected"), SAME_VALUES)
def test_equal_values_and_none_are_no_contradiction(script: dict[str, Any], expected: dict[str, Any]) -> None:
    rollout = GRPOConfig(**script).rollout
    assert {name: getattr(rollout, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (
            {"top_p": 0.7, "generation_kwargs": {"top_p": 0.5}},
            "generation_kwargs.top_p: is the same option as rollout.top_p, set to 0.7; keep one",
        ),
        (
            {"rollout": {"stop": ["a", "b"], "generation_kwargs": {"stop": "a"}}},
            "generation_kwargs.stop: is the same option as rollout.stop, set to ['a', 'b']; keep one",
        ),
        (
            {"generation_kwargs": {"max_new_tokens": 7, "max_tokens": 8}},
            "generation_kwargs.max_tokens: is the same option as rollout.max_completion_length, set to 7; keep one",
        ),
        (
            {"generation_kwargs": {"min_tokens": 7, "min_new_tokens": 8}},
            "generation_kwargs.min_new_tokens: is the same option as min_tokens, with another value; keep one",
        ),
        (
            {"vllm_structured_outputs_regex": "a|b", "generation_kwargs": {"structured_outputs": {"choice": ["x"]}}},
            "vllm_structured_outputs_regex: generation_kwargs has other structured_outputs; keep one of them",
        ),
    ],
)
def test_two_values_are_an_error(script: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        GRPOConfig(**script)
    assert str(caught.value) == error
