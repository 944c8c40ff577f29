"""Sampling: groups, seeds, versions, aborts, and the dense path for the one adapter."""

import gc
import math
import weakref

import pytest
import torch
from merged_slots import add_request

from rankup.grpo.model.prove import trainer_logprobs
from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.engine import EngineSettings, RolloutEngine, request_seed

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 14, 3], [7, 21, 40], [11, 12, 13, 14, 15]]


def settings(**changes) -> SamplingConfig:
    return SamplingConfig(**{"num_generations": 4, "max_completion_length": 12, **changes})


def by_index(groups):
    return sorted(groups, key=lambda group: group.index)


def test_every_prompt_yields_a_group_of_completions(make_engine):
    engine = make_engine()
    groups = by_index(engine.rollout(PROMPTS, settings()))
    assert [list(g.prompt_token_ids) for g in groups] == PROMPTS
    for completion in [c for g in groups for c in g.completions]:
        assert len(completion.token_ids) == len(completion.logprobs) <= 12
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
        assert all(lp <= 0 for lp in completion.logprobs)
    assert all(len(g.completions) == 4 for g in groups)


def test_equal_seeds_are_bit_exact_and_other_seeds_differ(make_engine):
    engine = make_engine()
    seeds = [request_seed(0, 3, i) for i in range(3)]
    first, again = (by_index(engine.rollout(PROMPTS, settings(), seeds=seeds)) for _ in range(2))
    assert first == again
    other = by_index(engine.rollout(PROMPTS, settings(), seeds=[request_seed(1, 3, i) for i in range(3)]))
    assert [g.completions for g in first] != [g.completions for g in other]
    assert len({c.token_ids for c in first[0].completions}) > 1, "the completions of a group have different seeds"


def test_seeds_work_with_more_prompt_tokens_than_fit_in_an_engine_step(make_engine):
    """On CPU vLLM crashes if the prompt of a seeded request is split over two steps."""
    engine = make_engine()
    prompts = [[5 + (7 * i + j) % 200 for j in range(200 + i)] for i in range(32)]
    assert sum(map(len, prompts)) > 4096
    groups = list(engine.rollout(prompts, settings(num_generations=2, max_completion_length=4), seeds=range(32)))
    assert len(groups) == 32


def test_request_seeds_differ_for_every_run_step_and_prompt():
    seeds = {request_seed(run, step, i) for run in range(5) for step in range(20) for i in range(20)}
    assert len(seeds) == 2000


def test_logprobs_are_the_processed_ones(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    temperature = 0.7
    (group,) = engine.rollout([PROMPTS[0]], settings(temperature=temperature, num_generations=1), seeds=[1])
    ids = [*group.prompt_token_ids, *group.completions[0].token_ids]
    with torch.no_grad():
        model_inputs = {"input_ids": torch.tensor([ids])}
        logits = policy.model(**model_inputs).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids[len(PROMPTS[0]) :])[:, None])[:, 0]
    assert torch.tensor(group.completions[0].logprobs) == pytest.approx(expected.tolist(), abs=2e-4)


def test_completions_have_a_version_that_counts_publishes(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    version = engine.publish(policy.write_slots)
    assert engine.publish(policy.write_slots) == version + 1
    groups = list(engine.rollout(PROMPTS, settings()))
    assert {c.policy_version for g in groups for c in g.completions} == {version + 1}


def test_groups_are_yielded_while_others_are_still_sampled(make_engine):
    engine = make_engine()
    seen = []
    one_each = settings(num_generations=1, max_completion_length=40)
    for group in engine.rollout([[5]] * 33, one_each, seeds=range(33)):  # 32 at a time: the last waits for another to end
        if not seen:
            assert engine._engine.has_unfinished_requests()
        seen.append(group.index)
    assert sorted(seen) == list(range(33))


def test_closing_the_iterator_aborts_the_rest(make_engine):
    engine = make_engine()
    iterator = engine.rollout(PROMPTS, settings(max_completion_length=100))
    next(iterator)
    iterator.close()
    assert not engine._engine.has_unfinished_requests()
    assert len(list(engine.rollout(PROMPTS, settings()))) == 3


def test_greedy_sampling_selects_the_likeliest_token(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    (group,) = engine.rollout([PROMPTS[0]], settings(temperature=0.0, num_generations=1))
    ids = [*group.prompt_token_ids, *group.completions[0].token_ids]
    (logprobs,) = trainer_logprobs(policy, [ids])
    assert all(lp > -math.log(policy.model.config.vocab_size) for lp in logprobs[len(PROMPTS[0]) - 1 :])


def test_a_repetition_penalty_keeps_tokens_from_repeating(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    (group,) = engine.rollout([PROMPTS[0]], settings(temperature=0.0, num_generations=1, repetition_penalty=1e4))
    sampled = group.completions[0].token_ids
    assert len({*PROMPTS[0], *sampled}) == len({*PROMPTS[0]}) + len(sampled)


def test_requests_with_and_without_the_adapter_share_a_batch(make_engine, make_policy):
    """The dense path masks rows without the adapter (vLLM's path on CPU is wrong for such batches)."""
    engine, policy = make_engine(lora_path="dense"), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0)
    expected = {}
    for ids in PROMPTS:
        for use_adapter in (True, False):
            name = add_request(engine, ids, params, use_adapter=use_adapter)
            expected[name] = ids, trainer_logprobs(policy, [ids], use_adapter=use_adapter)[0]
    outputs = {}
    while len(outputs) < len(expected):
        outputs |= {o.request_id: o for o in engine._engine.step() if o.finished}
    for name, (ids, logprobs) in expected.items():
        got = [at[token].logprob for at, token in zip(outputs[name].prompt_logprobs[1:], ids[1:], strict=True)]
        assert got == pytest.approx(logprobs, abs=3e-4)


def test_vllms_lora_kernels_are_an_option(make_engine, make_policy):
    engine, policy = make_engine(lora_path="punica"), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    answers, oracle = engine.prompt_logprobs(PROMPTS), trainer_logprobs(policy, PROMPTS)
    for got, expected in zip(answers, oracle, strict=True):
        assert got == pytest.approx(expected, abs=3e-4)


def test_closing_an_engine_frees_its_weights_and_its_cache(make_engine, engine_shelf):
    engine = make_engine(lora_path="punica")  # the engine of the last test
    tensors = engine._apply_model(lambda model: [weakref.ref(parameter) for parameter in model.parameters()])
    caches = engine._engine.model_executor.driver_worker.worker.model_runner.kv_caches
    tensors += [weakref.ref(cache) for cache in caches]
    del caches
    engine_shelf.close()
    assert tensors and not any(tensor() is not None for tensor in tensors)
    assert gc.get_freeze_count() == 0, "further garbage is collected"


def test_targets_that_vllm_cannot_adapt_are_named(tiny_model_path, engine_shelf):
    engine_shelf.close()  # two do not fit
    model, rollout = str(tiny_model_path("llama")), RolloutConfig(max_prompt_length=56, max_completion_length=8)
    with pytest.raises(ValueError, match=r"lora\.targets"):
        RolloutEngine(EngineSettings(model=model, rollout=rollout, target_modules=("q_proj", "w_proj")))
