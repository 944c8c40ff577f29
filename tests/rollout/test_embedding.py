"""An adapter on the input embedding in real vLLM, against transformers with the adapter merged into its weights in fp64.

The adapter exists only in the slots. Llama's head is tied to the embedding and must use the base weight without the adapter.
"""

from __future__ import annotations

import pytest
import torch
from merged_slots import MergedModel, assert_a_mixed_batch_agrees, flat, publish_random

from rankup.grpo.model.prove import prove_slots
from rankup.rollout.config import SamplingConfig

pytestmark = pytest.mark.engine

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens")
EMBEDDING = "model.embed_tokens"
KINDS = ["qwen3", "llama"]  # an untied head, a tied head
SEQUENCES = [[5, 9, 14, 3, 77, 60, 31, 8], [7, 21, 40, 2, 90, 55], [11, 200, 13, 200, 200]]
EXACT = 3e-4  # fp32 against fp64


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Module scope: all tests of a kind run one after another and share an engine."""
    return request.param


@pytest.mark.parametrize("everywhere", [False, True], ids=["embedding", "everywhere"])
def test_prompt_logprobs_are_those_of_the_merged_embedding(make_engine, tiny_model_path, kind, everywhere):
    engine, folder = make_engine(kind, target_modules=EVERYTHING), tiny_model_path(kind)
    assert (engine.slots[EMBEDDING].a.shape, engine.slots[EMBEDDING].b.shape) == ((64, 260), (96, 64))
    publish_random(engine, engine.slots if everywhere else [EMBEDDING])
    adapted, base = MergedModel(folder, engine.slots), MergedModel(folder, {})
    got = flat(engine.prompt_logprobs(SEQUENCES))
    expected = flat([adapted.logprobs(ids) for ids in SEQUENCES])
    assert got == pytest.approx(expected, abs=EXACT)
    without = flat(engine.prompt_logprobs(SEQUENCES, use_adapter=False))
    assert without == pytest.approx(flat([base.logprobs(ids) for ids in SEQUENCES]), abs=EXACT)
    assert (torch.tensor(expected) - torch.tensor(without)).abs().mean() > 100 * EXACT


@pytest.mark.parametrize("use_adapter", [True, False])
def test_logprobs_of_sampled_tokens_are_those_of_the_merged_embedding(make_engine, tiny_model_path, kind, use_adapter):
    engine = make_engine(kind, target_modules=EVERYTHING)
    publish_random(engine, [EMBEDDING, "model.layers.1.mlp.up_proj"])
    oracle = MergedModel(tiny_model_path(kind), engine.slots if use_adapter else {})
    sampling = SamplingConfig(num_generations=3, max_completion_length=8)
    for group in engine.rollout(SEQUENCES, sampling, seeds=range(3), use_adapter=use_adapter):
        prompt = list(group.prompt_token_ids)
        for completion in group.completions:
            expected = oracle.logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 :]
            assert list(completion.logprobs) == pytest.approx(expected, abs=EXACT)


def test_trainer_and_engine_agree_on_each_layer_alone(make_engine, make_policy, kind):
    engine = make_engine(kind, target_modules=EVERYTHING)
    policy = make_policy(kind, targets=["embed_tokens", "k_proj", "lm_head"], rank_pattern={"embed_tokens": 40})
    policy.attach(engine.slots)
    proofs = {proof.what: proof for proof in prove_slots(policy, engine, each=True)}
    assert {EMBEDDING, "lm_head", "model.layers.1.self_attn.k_proj", "all projections"} <= set(proofs)
    assert all(proof.gap <= 0.01 * proof.effect for proof in proofs.values()), proofs


def test_a_trainer_that_does_not_adapt_the_embedding_is_detected(make_engine, make_policy, kind):
    engine = make_engine(kind, target_modules=EVERYTHING)
    policy = make_policy(kind, targets=["embed_tokens", "k_proj"])
    slots = dict(engine.slots)
    slots[EMBEDDING] = policy.layers[EMBEDDING].slot  # memory that the engine does not read
    policy.attach(slots)
    engine.slots[EMBEDDING].b.zero_()
    with pytest.raises(RuntimeError, match=f"with an adapter on {EMBEDDING}, trainer and engine differ"):
        prove_slots(policy, engine, each=True)


def test_requests_with_and_without_the_adapter_share_a_batch(make_engine, tiny_model_path):
    engine = make_engine("llama", target_modules=EVERYTHING)
    publish_random(engine, [EMBEDDING])
    assert_a_mixed_batch_agrees(engine, tiny_model_path("llama"), [3, 9, 4, 2], tolerance=EXACT)


def test_the_embedding_may_be_the_only_target(make_engine, tiny_model_path):
    engine = make_engine("llama", target_modules=("embed_tokens",))
    assert list(engine.slots) == [EMBEDDING]
    publish_random(engine, [EMBEDDING])
    adapted = MergedModel(tiny_model_path("llama"), engine.slots)
    expected = flat([adapted.logprobs(ids) for ids in SEQUENCES])
    assert flat(engine.prompt_logprobs(SEQUENCES)) == pytest.approx(expected, abs=EXACT)


def test_an_adapter_on_the_embedding_that_vllm_cannot_load_is_an_error(make_engine):
    with pytest.raises(ValueError, match=r"^vLLM cannot load an adapter on embed_tokens for this model: remove it"):
        make_engine("qwen2", target_modules=("q_proj", "embed_tokens"))
