"""An adapter on the LM head in real vLLM, against transformers with the adapter merged into its weights in fp64.

The adapter exists only in the slots. vLLM pads the tiny vocabularies (260 to 320), so logits are wider than the adapter.
"""

from __future__ import annotations

import pytest
import torch
from merged_slots import MergedModel, assert_a_mixed_batch_agrees, flat, publish_random
from transformers import AutoModelForCausalLM

from rankup.rollout.config import SamplingConfig

pytestmark = pytest.mark.engine

HEAD_TOO = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
KINDS = ["qwen3", "qwen2", "llama"]  # the last two have tied heads
SEQUENCES = [[5, 9, 14, 3, 77, 60, 31, 8], [7, 21, 40, 2, 90, 55], [11, 200, 13]]
EXACT = 3e-4  # fp32 against fp64


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Module scope: all tests of a kind run one after another and share an engine."""
    return request.param


@pytest.mark.parametrize("everywhere", [False, True], ids=["head", "everywhere"])
def test_prompt_logprobs_are_those_of_the_merged_head(make_engine, tiny_model_path, kind, everywhere):
    engine, folder = make_engine(kind, target_modules=HEAD_TOO), tiny_model_path(kind)
    assert (engine.slots["lm_head"].a.shape, engine.slots["lm_head"].b.shape) == (
        (64, AutoModelForCausalLM.from_pretrained(folder).config.hidden_size),
        (260, 64),
    )
    publish_random(engine, engine.slots if everywhere else ["lm_head"])
    adapted, base = MergedModel(folder, engine.slots), MergedModel(folder, {})
    got = flat(engine.prompt_logprobs(SEQUENCES))
    expected = flat([adapted.logprobs(ids) for ids in SEQUENCES])
    assert got == pytest.approx(expected, abs=EXACT)
    without = flat(engine.prompt_logprobs(SEQUENCES, use_adapter=False))
    assert without == pytest.approx(flat([base.logprobs(ids) for ids in SEQUENCES]), abs=EXACT)
    assert (torch.tensor(expected) - torch.tensor(without)).abs().mean() > 100 * EXACT


@pytest.mark.parametrize("use_adapter", [True, False])
def test_logprobs_of_sampled_tokens_are_those_of_the_merged_head(
    make_engine, tiny_model_path, kind, use_adapter
):
    engine = make_engine(kind, target_modules=HEAD_TOO)
    publish_random(engine, ["lm_head", "model.layers.1.mlp.up_proj"])
    oracle = MergedModel(tiny_model_path(kind), engine.slots if use_adapter else {})
    sampling = SamplingConfig(num_generations=3, max_completion_length=8)
    for group in engine.rollout(SEQUENCES, sampling, seeds=range(3), use_adapter=use_adapter):
        prompt = list(group.prompt_token_ids)
        for completion in group.completions:
            expected = oracle.logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 :]
            assert list(completion.logprobs) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("lengths", [[7] * 6, [3, 9, 4, 2]], ids=["as many rows as requests", "ragged"])
def test_requests_with_and_without_the_adapter_share_a_batch(make_engine, tiny_model_path, lengths):
    engine = make_engine("llama", target_modules=HEAD_TOO)
    publish_random(engine, ["lm_head"])
    assert_a_mixed_batch_agrees(engine, tiny_model_path("llama"), lengths, tolerance=EXACT)


def test_the_head_is_dense_even_with_vllms_kernels(make_engine, tiny_model_path):
    engine = make_engine("llama", target_modules=HEAD_TOO, lora_path="punica")
    publish_random(engine, engine.slots)
    adapted = MergedModel(tiny_model_path("llama"), engine.slots)
    expected = flat([adapted.logprobs(ids) for ids in SEQUENCES])
    assert flat(engine.prompt_logprobs(SEQUENCES)) == pytest.approx(expected, abs=EXACT)


def test_the_head_may_be_the_only_target(make_engine, tiny_model_path):
    engine = make_engine("llama", target_modules=("lm_head",))
    assert list(engine.slots) == ["lm_head"]
    publish_random(engine, ["lm_head"])
    adapted = MergedModel(tiny_model_path("llama"), engine.slots)
    expected = flat([adapted.logprobs(ids) for ids in SEQUENCES])
    assert flat(engine.prompt_logprobs(SEQUENCES)) == pytest.approx(expected, abs=EXACT)


def test_an_adapter_on_the_head_alone_that_vllm_cannot_load_is_an_error(make_engine):
    with pytest.raises(ValueError, match=r"^vLLM cannot load an adapter on lm_head alone .* lora\.targets$"):
        make_engine("qwen2", target_modules=("lm_head",))


def test_the_head_has_a_slot_only_if_it_is_a_target(make_engine):
    assert "lm_head" not in make_engine("llama").slots
