"""`rollout.generation_kwargs` and stop strings on a real engine of vLLM: completions and their log-probabilities."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch

from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.engine import EngineSettings, RolloutEngine
from rankup.rollout.types import Completion

pytestmark = pytest.mark.engine

PROMPT = [5, 9, 14, 3]
EOS, UNK = 2, 3
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


def sampled(engine: RolloutEngine, **options: Any) -> list[Completion]:
    """Completions of the prompt, with the options of `rollout`; others are `generation_kwargs`."""
    own = {name: options.pop(name) for name in [*options] if name in SamplingConfig.model_fields}
    sampling = SamplingConfig(
        **{"num_generations": 16, "max_completion_length": 24, "generation_kwargs": options, **own}
    )
    (group,) = engine.rollout([PROMPT], sampling, seeds=[7])
    return list(group.completions)


def token(engine: RolloutEngine, text: str) -> int:
    (id,) = engine._tokenizer.encode(text, add_special_tokens=False)
    return id


@pytest.fixture
def engine(make_engine, make_policy) -> RolloutEngine:
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    return engine


def test_texts_match_a_regular_expression(engine: RolloutEngine) -> None:
    completions = sampled(engine, structured_outputs={"regex": r"-?[0-9]{1,4}\.[05]"})
    assert {c.finish_reason for c in completions} == {"stop"} and all(c.token_ids[-1] == EOS for c in completions)
    assert all(re.fullmatch(r"-?[0-9]{1,4}\.[05]", c.text) for c in completions), [c.text for c in completions]
    assert len({c.text for c in completions}) > 8


@pytest.mark.parametrize(
    ("wanted", "is_right"),
    [
        ({"choice": ["yes", "no", "maybe"]}, lambda text: text in ("yes", "no", "maybe")),
        ({"grammar": 'root ::= "<" [a-c]+ ">" | "none"'}, lambda text: re.fullmatch("<[a-c]+>|none", text) is not None),
        ({"json": SCHEMA}, lambda text: isinstance(json.loads(text)["ok"], bool)),
        ({"json": json.dumps(SCHEMA)}, lambda text: isinstance(json.loads(text)["ok"], bool)),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ],
)
def test_texts_match_choices_grammars_and_schemas(engine: RolloutEngine, wanted: dict[str, Any], is_right: Any) -> None:
    completions = sampled(engine, structured_outputs=wanted, max_completion_length=64, num_generations=32)
    finished = [c for c in completions if c.finish_reason == "stop"]
    assert len(finished) > 4 and all(is_right(c.text) for c in finished), [c.text for c in finished]


def test_log_probabilities_are_those_of_the_tokens_that_are_left(engine: RolloutEngine) -> None:
    """The sampler's distribution sums to one over them: the trainer's logits, renormalised."""
    allowed = [token(engine, digit) for digit in "01234"]
    for completion in sampled(engine, structured_outputs={"regex": "[0-4]"}, num_generations=4):
        first = completion.token_ids[0]
        all_of_them = [engine.prompt_logprobs([[*PROMPT, id]])[0][-1] for id in allowed]
        (own,) = (value for id, value in zip(allowed, all_of_them, strict=True) if id == first)
        total = math.log(sum(math.exp(value) for value in all_of_them))
        assert completion.logprobs[0] == pytest.approx(own - total, abs=1e-3)


def test_completions_have_the_least_number_of_tokens(engine: RolloutEngine) -> None:
    ends_soon = {"logit_bias": {EOS: 20.0}}
    assert {len(c.token_ids) for c in sampled(engine, **ends_soon)} == {1}
    completions = sampled(engine, **ends_soon, min_tokens=5)
    assert all(EOS not in c.token_ids[:5] for c in completions)
    assert {len(c.token_ids) for c in completions} == {6}


def test_bad_words_are_not_sampled(engine: RolloutEngine) -> None:
    word = {"logit_bias": {token(engine, "a"): 9.0, token(engine, "b"): 9.0}}
    assert any("ab" in c.text for c in sampled(engine, **word))
    completions = sampled(engine, **word, bad_words=["ab"])
    assert not any("ab" in c.text for c in completions)
    assert any("a" in c.text and "b" in c.text for c in completions)


def test_a_bias_and_a_list_of_tokens_decide_what_is_sampled(engine: RolloutEngine) -> None:
    assert {t for c in sampled(engine, logit_bias={70: 100.0}) for t in c.token_ids} == {70}
    assert {t for c in sampled(engine, allowed_token_ids=[70, 71]) for t in c.token_ids} == {70, 71}


def test_a_presence_penalty_makes_tokens_repeat_less(engine: RolloutEngine) -> None:
    few = {"allowed_token_ids": [70, 71, 72, 73], "num_generations": 64, "max_completion_length": 4}

    def distinct(**options: float) -> float:
        return sum(len(set(c.token_ids)) for c in sampled(engine, **few, **options))

    assert distinct(presence_penalty=-2.0) < distinct() < distinct(presence_penalty=2.0)
    assert distinct(frequency_penalty=-2.0) < distinct() < distinct(frequency_penalty=2.0)


def test_the_end_of_sequence_can_be_ignored_and_other_tokens_can_end(engine: RolloutEngine) -> None:
    bias = {"logit_bias": {EOS: 4.0}}
    completions = sampled(engine, **bias, ignore_eos=True)
    assert {(len(c.token_ids), c.finish_reason) for c in completions} == {(24, "length")}
    assert any(EOS in c.token_ids for c in completions)
    for completion in sampled(engine, stop_token_ids=[*range(60, 100)], ignore_eos=True):
        if completion.finish_reason == "stop":
            assert [60 <= t < 100 for t in completion.token_ids] == [False] * (len(completion.token_ids) - 1) + [True]
            assert completion.text == engine._tokenizer.decode(list(completion.token_ids[:-1]), skip_special_tokens=True)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("others", [[], ["never there"]])
def test_a_special_token_is_a_stop_string(engine: RolloutEngine, skip: bool, others: list[str]) -> None:
    options: dict[str, Any] = {"logit_bias": {UNK: 5.0}, "skip_special_tokens": skip}
    free = sampled(engine, **options)
    assert sum(UNK in c.token_ids for c in free) > 8
    for includes in (False, True):
        stopped = sampled(engine, **options, stop=["<unk>", *others], include_stop_str_in_output=includes)
        for before, after in zip(free, stopped, strict=True):
            if UNK in before.token_ids:
                end = before.token_ids.index(UNK) + 1
                assert (after.token_ids, after.finish_reason) == (before.token_ids[:end], "stop")
                text = engine._tokenizer.decode(list(after.token_ids[:-1]), skip_special_tokens=skip)
                assert after.text == text + "<unk>" * includes
            else:
                assert after == before


def test_special_tokens_can_stay_in_the_text(engine: RolloutEngine) -> None:
    options: dict[str, Any] = {"logit_bias": {UNK: 5.0}, "ignore_eos": True}
    without, with_them = sampled(engine, **options), sampled(engine, **options, skip_special_tokens=False)
    assert [c.token_ids for c in without] == [c.token_ids for c in with_them]
    assert not any("<unk>" in c.text for c in without)
    assert all(c.text.count("<unk>") == c.token_ids.count(UNK) for c in with_them)


@pytest.mark.parametrize("temperature", [0.01, 0.3, 2.0])
def test_log_probabilities_are_the_trainers_at_the_ends_of_the_range(engine: RolloutEngine, make_policy, temperature: float):
    policy = make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    completions = sampled(engine, temperature=temperature, num_generations=8)
    assert trainer_logprobs_at(policy, completions, temperature) == [pytest.approx(c.logprobs, abs=3e-3) for c in completions]


def trainer_logprobs_at(policy: Any, completions: list[Completion], temperature: float) -> list[list[float]]:
    rows = []
    for completion in completions:
        ids = torch.tensor([[*PROMPT, *completion.token_ids]])
        with policy.sampling(use_adapter=True):
            logits = policy.model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1].float()
        of_tokens = (logits / temperature).log_softmax(-1).gather(1, ids[0, len(PROMPT) :, None])[:, 0]
        rows.append(of_tokens.tolist())
    return rows


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"structured_outputs": {"regex": "(["}}, "regex"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, ""),
        ({"structured_outputs": {"grammar": "root ::= ("}}, ""),
    ],
)
def test_what_vllm_cannot_compile_is_refused_before_it_loads_the_model(
    tiny_model_path, engine_shelf, kwargs: dict[str, Any], message: str
) -> None:
    engine_shelf.close()  # two do not fit
    rollout = RolloutConfig.model_validate({"max_prompt_length": 56, "max_completion_length": 8, "generation_kwargs": kwargs})
    settings = EngineSettings(model=str(tiny_model_path("llama")), rollout=rollout, target_modules=("q_proj",))
    with pytest.raises(ValueError, match=rf"^rollout\.generation_kwargs: .*{message}"):
        RolloutEngine(settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_cache_gib": 1e-4, "max_prompt_length": 300},
            r"^the KV cache has .* a sequence of 308 tokens \(rollout\.max_prompt_length \+ rollout\.max_completion_length\) "
            r"needs .*: raise rollout\.kv_cache_gib, or lower the lengths",
        ),
        (
            {"max_prompt_length": 3000},
            r"^rollout\.max_prompt_length \+ rollout\.max_completion_length is 3008 tokens, and the model's context ends at 512"
        ),
        ({"kv_cache_gib": 1e5}, r"^rollout\.kv_cache_gib is 100000\.0, and .* GiB of memory are free: lower it"),
    ],
)
def test_vllms_errors_about_lengths_and_cache_name_the_options(
    tiny_model_path, engine_shelf, options: dict[str, Any], message: str
) -> None:
    engine_shelf.close()
    rollout = RolloutConfig.model_validate({"max_prompt_length": 56, "max_completion_length": 8, **options})
    settings = EngineSettings(model=str(tiny_model_path("llama")), rollout=rollout, target_modules=("q_proj",))
    with pytest.raises(ValueError, match=message):
        RolloutEngine(settings)
