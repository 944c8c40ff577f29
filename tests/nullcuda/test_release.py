"""The KV cache's memory is released while training, with vLLM's GPU model runner, graphs and asynchronous scheduling."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from sample_groups import random_groups

import rankup.rollout.engine as engine_module
from rankup.grpo.config import GRPOConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.engine import EngineSettings, RolloutEngine

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
SAMPLING = SamplingConfig(num_generations=2, max_completion_length=5)
ROLLOUT = RolloutConfig(max_prompt_length=64, max_completion_length=64, gpu_memory_utilization=0.45, enforce_eager=True)
OPTIONS: dict[str, Any] = {"mode": "none", "veto": 0.0, "guards": {"enabled": False}, "warmup_ratio": 0.0}
CONFIG = GRPOConfig(rank=16, alpha=32, learning_rate=1e-2, max_steps=5, **OPTIONS)
MIB = 2**20


@dataclass
class Session:
    """An engine and the policy on its adapter and base weights."""

    engine: RolloutEngine
    policy: Policy

    def step(self, *, suspends: bool) -> list[Any]:
        """Sample, train and sample again, from the adapter that a seed determines; everything that came out."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for master in self.policy.masters:
                master.copy_(torch.randn(master.shape, generator=generator) * 0.05)
        self.engine.publish(self.policy.write_slots)
        results = [self.sampled()]
        learner = Learner(self.policy, CONFIG)
        if suspends:
            self.engine.suspend()
        metrics = learner.update(random_groups([(5, [3, 5, 4, 8])]), step=0, observed={"reward": 0.3}).metrics
        self.engine.publish(self.policy.write_slots)
        assert self.engine.is_suspended == suspends
        results += [self.sampled(), self.engine.prompt_logprobs(PROMPTS)]
        return [*results, metrics["grad_norm"], [master.tolist() for master in self.policy.masters]]

    def sampled(self) -> list[Any]:
        """The completions of the prompts, with their log-probabilities."""
        groups = sorted(self.engine.rollout(PROMPTS, SAMPLING, seeds=[1, 2]), key=lambda group: group.index)
        return [(c.token_ids, c.logprobs) for group in groups for c in group.completions]


@pytest.fixture(params=["eager", "eager, synchronous", "eager, v2", "graphs"])
def session(request: pytest.FixtureRequest, tiny_model_path, monkeypatch, no_other_engine) -> Iterator[Session]:
    original = engine_module.engine_args

    def changed_args(settings: EngineSettings, **options: bool) -> Any:
        return replace(original(settings, **options), async_scheduling="synchronous" not in request.param)

    monkeypatch.setattr(engine_module, "engine_args", changed_args)
    model = str(tiny_model_path("llama"))
    changes: dict[str, Any] = {"enforce_eager": "eager" in request.param}
    if "v2" in request.param:
        changes |= {"model_runner": "v2", "lora_path": "dense"}  # the interpreter is slow with LoRA kernels
    rollout = ROLLOUT.model_copy(update=changes)
    engine = RolloutEngine(EngineSettings(model=model, rollout=rollout, target_modules=TARGETS, max_rank=16, max_num_seqs=8))
    policy = Policy(model, lora=CONFIG.lora, device="cuda", shared=engine.base_weights())
    assert not policy.base.unshared
    policy.attach(engine.slots)
    session = Session(engine, policy)
    yield session
    del policy, session.policy  # views of the engine's weights
    gc.collect()
    session.engine.close()


def used_mib() -> int:
    free, total = torch.cuda.mem_get_info()
    return (total - free) // MIB


def test_a_step_with_release_equals_one_without(session):
    expected = session.step(suspends=False)
    assert expected[0] != expected[1]
    before = used_mib()
    session.engine.suspend()
    session.engine.suspend()
    assert used_mib() < 0.1 * before, "nearly all is the cache of a tiny model"
    session.engine.resume()
    session.engine.resume()
    assert used_mib() >= 0.95 * before, "without what torch had kept of freed memory"
    for _ in range(2):
        assert session.step(suspends=True) == expected


@pytest.mark.parametrize("session", ["eager"], indirect=True)
def test_an_engine_that_does_not_fit_any_more_says_what_to_lower_and_can_try_again(session, monkeypatch):
    session.engine.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (MIB, 6 * 2**30))
        with pytest.raises(RuntimeError, match=r"KV cache of .* GiB .* does not fit any more.*rollout.gpu_memory_utilization"):
            session.sampled()
    assert session.engine.is_suspended
    assert len(session.sampled()) == 4
    session.engine.suspend()  # closed in this state


@pytest.mark.parametrize("session", ["eager", "graphs"], indirect=True)
def test_a_second_engine_waits_for_the_end_of_the_first(session):
    expected = session.step(suspends=True)
    with pytest.raises(ValueError, match=r"another engine of this process is open.*rollout\.release_kv_cache: false"):
        RolloutEngine(session.engine.settings)
    weights = {name: weight.clone() for name, weight in session.policy.base.weights.items()}
    session.engine.suspend()
    session.engine.close()
    second = RolloutEngine(session.engine.settings)  # although a policy still holds the first one's weights
    assert all(torch.equal(session.policy.base.weights[name], weight) for name, weight in weights.items())
    policy = Policy(second.settings.model, lora=CONFIG.lora, device="cuda", shared=second.base_weights())
    policy.attach(second.slots)
    session.engine, session.policy = second, policy
    assert session.step(suspends=True) == expected


@pytest.mark.parametrize("session", ["eager"], indirect=True)
def test_an_engine_is_closed_while_something_else_has_its_memory(session, monkeypatch):
    session.engine.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (MIB, 6 * 2**30))
        session.engine.close()
    for _ in range(2):  # the caches of three engines together do not fit
        session.engine = RolloutEngine(session.engine.settings)
        session.engine.suspend()
        assert len(session.sampled()) == 4
        session.engine.suspend()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda: (MIB, 6 * 2**30))
            session.engine.close()
    session.engine = RolloutEngine(session.engine.settings)
    session.engine.suspend()
    assert len(session.sampled()) == 4
