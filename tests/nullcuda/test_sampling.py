"""vLLM on the device samples with `cuda_ops.sample`: a request's tokens depend on its seed, whatever it is sampled with."""

from __future__ import annotations

import pytest
import torch

from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.cuda_ops import sample
from rankup.rollout.generation_kwargs import GenerationKwargs

pytestmark = [
    pytest.mark.nullcuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 9, 14], [3], [7, 7, 2, 40, 11]]
SAMPLING = SamplingConfig(num_generations=2, max_completion_length=6, generation_kwargs=GenerationKwargs(ignore_eos=True))


@pytest.fixture
def engine(make_engine):
    rollout = RolloutConfig(max_prompt_length=64, max_completion_length=64, enforce_eager=True, lora_path="dense")
    return make_engine(rollout=rollout)


def tokens(engine, prompts: list[list[int]], seeds: list[int]) -> dict[int, list[tuple[int, ...]]]:
    groups = engine.rollout(prompts, SAMPLING, seeds=seeds)
    return {seeds[group.index]: [completion.token_ids for completion in group.completions] for group in groups}


def test_the_engine_uses_the_replacement(engine) -> None:
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    assert runner.sampler.topk_topp_sampler.forward is sample


def test_tokens_depend_on_the_seed_and_not_on_the_batch(engine) -> None:
    together = tokens(engine, PROMPTS, [1, 10, 20])
    assert tokens(engine, PROMPTS[1:2], [10]) == {10: together[10]}
    assert tokens(engine, PROMPTS[::-1], [20, 10, 1]) == together
    everything = [completion for group in together.values() for completion in group]
    assert len(set(everything)) == len(everything)


def test_log_probabilities_are_those_of_the_sampled_tokens(engine) -> None:
    (group,) = engine.rollout(PROMPTS[:1], SAMPLING, seeds=[3])
    rows = [[*PROMPTS[0], *completion.token_ids] for completion in group.completions]
    for completion, logprobs in zip(group.completions, engine.prompt_logprobs(rows), strict=True):
        assert completion.logprobs == pytest.approx(logprobs[len(PROMPTS[0]) - 1 :], abs=1e-3)
