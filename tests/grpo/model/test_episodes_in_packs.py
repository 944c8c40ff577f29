"""Log-probabilities of episodes in packs are those of a plain forward over prompt and completion, at the sampled places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_groups import random_groups, with_given
from transformers import AutoModelForCausalLM

from rankup.grpo.config import LoraConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import by_completion, pack, pad
from rankup.grpo.model.policy import Policy

SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=4)), min_size=1, max_size=3
)


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "falcon"])
def models(request: pytest.FixtureRequest, tiny_model_path) -> tuple[Policy, Any]:
    """A policy, and the model of transformers."""
    path = str(tiny_model_path(request.param))
    policy = Policy(path, lora=LoraConfig(rank=4), dtype="float32")
    return policy, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def plain_logprobs(model: Any, groups: list[Group]) -> list[list[float]]:
    """One forward a completion over all of its tokens; values where no range of given tokens is."""
    results = []
    for group in groups:
        prompt = group.prompt.token_ids
        for completion in group.completions:
            ids = completion.token_ids
            if not completion.logprobs:
                continue
            with torch.no_grad():
                logprobs_LV = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            places = [i for i in range(len(ids)) if not any(start <= i < end for start, end in completion.given)]
            results.append([logprobs_LV[len(prompt) + i - 1, ids[i]].item() for i in places])
    return results


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, budget=st.sampled_from([20, 45, 1000]), seed=st.integers(0, 99))
def test_logprobs_of_both_layouts_are_those_of_a_plain_forward(
    models: tuple[Policy, Any], shapes: list[tuple[int, list[int]]], budget: int, seed: int
) -> None:
    policy, plain = models
    groups = with_given(random_groups(shapes, seed=seed), seed=seed)
    if policy.plain_reason is None:
        layouts = {True: pack(groups, tokens_per_pack=budget), False: pad(groups, tokens_per_pack=budget, pad_token_id=0)}
    else:
        layouts = {False: pad(groups, tokens_per_pack=budget, pad_token_id=0)}
    expected = plain_logprobs(plain, groups)
    for policy.shares_prompts, packs in layouts.items():
        found = by_completion(packs, [policy.logprobs(one)[0] for one in packs])
        assert [len(values) for values in found] == [len(values) for values in expected]
        for values, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(values, torch.tensor(wanted), atol=2e-5, rtol=1e-5)
