"""The KV cache's memory is released between rollouts, and nothing else changes."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path

import pytest
import torch

from rankup.rollout.activity import Activity, KeptCache
from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.kv_cache import return_pages
from rankup.rollout.turns import Request
from rankup.rollout.types import EngineError

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 14, 3], [7, 21, 40], [11, 12, 13, 14, 15]]
SAMPLING = SamplingConfig(num_generations=4, max_completion_length=12)
KV_CACHE_GIB = 0.125
ROLLOUT = RolloutConfig(max_prompt_length=128, max_completion_length=128, kv_cache_gib=KV_CACHE_GIB)


@pytest.fixture
def engine(make_engine):
    engine = make_engine(rollout=ROLLOUT)
    engine.resume()
    return engine


@pytest.fixture(params=["vllm", "torch"])
def any_engine(request: pytest.FixtureRequest, make_policy, tiny_model_path):
    if request.param == "vllm":
        return request.getfixturevalue("engine")
    from rankup.rollout.torch_engine import TorchEngine

    return TorchEngine(make_policy(), str(tiny_model_path("llama")), max_num_seqs=32, max_model_length=256)


def sampled(engine, seeds=(1, 2, 3)):
    return sorted(engine.rollout(PROMPTS, SAMPLING, seeds=seeds), key=lambda group: group.index)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def cache_of(engine) -> torch.UntypedStorage:
    (cache,) = {
        one.untyped_storage() for one in engine._engine.model_executor.driver_worker.worker.model_runner.kv_caches[:1]
    }
    return cache


def resident_of_cache(engine) -> int:
    """Bytes of the KV cache that are in memory."""
    cache = cache_of(engine)
    start = cache.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = cache.data_ptr() + cache.nbytes() - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_what_samples_resumes_and_samples_the_same(any_engine):
    before, logprobs = sampled(any_engine), any_engine.prompt_logprobs(PROMPTS)
    any_engine.suspend()
    assert any_engine.is_suspended
    assert sampled(any_engine) == before
    assert not any_engine.is_suspended
    any_engine.suspend()
    assert any_engine.prompt_logprobs(PROMPTS) == logprobs
    any_engine.suspend()
    requests = any_engine.requests(SAMPLING)
    with requests:
        assert not any_engine.is_suspended
        turns = []
        requests.submit(0, Request(prompt_token_ids=(5, 9, 14, 3), max_tokens=4, seed=1))
        while requests.has_unfinished:
            turns = requests.step()
    assert len(turns[0][1].token_ids) <= 4


def test_both_states_can_be_entered_twice(any_engine):
    for change, expected in ((any_engine.suspend, True), (any_engine.resume, False)) * 2:
        change()
        change()
        assert any_engine.is_suspended is expected


def test_an_iterator_that_was_not_started_does_not_keep_the_engine_from_being_suspended(any_engine):
    iterator = iter(any_engine.rollout(PROMPTS, SAMPLING, seeds=[1, 2, 3]))
    any_engine.suspend()
    assert sorted(iterator, key=lambda group: group.index) == sampled(any_engine)


def test_an_engine_is_not_suspended_during_a_rollout(any_engine):
    expected = sampled(any_engine)
    iterator = iter(any_engine.rollout(PROMPTS, SAMPLING, seeds=[1, 2, 3]))
    groups = [next(iterator)]
    for change in (any_engine.suspend, lambda: any_engine.publish(lambda: None)):
        with pytest.raises(RuntimeError, match="during a rollout: exhaust or close the iterator"):
            change()
    assert not any_engine.is_suspended
    assert sorted([*groups, *iterator], key=lambda group: group.index) == expected
    any_engine.suspend()
    assert any_engine.is_suspended


def test_an_iterator_that_was_abandoned_does_not_keep_the_engine_from_being_suspended(any_engine):
    class Holder:
        """In a reference cycle, as a traceback may be: only the garbage collector frees it."""

        def __init__(self, iterator) -> None:
            self.iterator, self.itself = iterator, self

    gc.disable()
    try:
        holder = Holder(iter(any_engine.rollout(PROMPTS, SAMPLING, seeds=[1, 2, 3])))
        next(holder.iterator)
        del holder
        any_engine.suspend()
    finally:
        gc.enable()
    assert any_engine.is_suspended
    assert len(sampled(any_engine)) == 3


def test_a_rollout_within_another_one_gets_its_own_requests(any_engine):
    """As when a reward function samples."""
    expected, logprobs = sampled(any_engine), any_engine.prompt_logprobs(PROMPTS)
    groups = []
    for group in any_engine.rollout(PROMPTS, SAMPLING, seeds=[1, 2, 3]):
        groups.append(group)
        for got, wanted in zip(any_engine.prompt_logprobs(PROMPTS), logprobs, strict=True):
            assert got == pytest.approx(wanted, abs=1e-4)
        assert [g.index for g in sampled(any_engine)] == [0, 1, 2]
    tokens = [[c.token_ids for c in g.completions] for g in sorted(groups, key=lambda g: g.index)]
    assert tokens == [[c.token_ids for c in g.completions] for g in expected]


def test_a_policy_is_published_in_both_states(engine, make_policy):
    policy = make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    tokens = [[c.token_ids for c in g.completions] for g in sampled(engine)]
    engine.publish(lambda: [slot.b.zero_() for slot in engine.slots.values()])  # type: ignore[arg-type,return-value]
    assert tokens != [[c.token_ids for c in g.completions] for g in sampled(engine)]
    engine.suspend()
    version = engine.publish(policy.write_slots)
    assert engine.is_suspended
    again = sampled(engine)
    assert [[c.token_ids for c in g.completions] for g in again] == tokens
    assert {c.policy_version for g in again for c in g.completions} == {version}


def test_the_memory_of_the_cache_is_returned(engine):
    """All of it after the start, which writes zeros; later what sampling has written."""
    engine.suspend()
    assert resident_of_cache(engine) < 0.01 * cache_of(engine).nbytes()
    prompts = [[5 + (7 * i + j) % 200 for j in range(100)] for i in range(32)]
    long = SamplingConfig(num_generations=4, max_completion_length=100)
    assert len(list(engine.rollout(prompts, long, seeds=range(32)))) == 32
    touched, before = resident_of_cache(engine), resident_bytes()
    assert touched > 2**20
    engine.suspend()
    released = before - resident_bytes()
    assert released >= 0.9 * touched, (released, touched)
    assert resident_of_cache(engine) < 0.1 * touched


def test_only_whole_pages_are_returned():
    data = torch.full((5 * mmap.PAGESIZE,), 7, dtype=torch.uint8)
    start = -data.data_ptr() % mmap.PAGESIZE + 10
    assert return_pages(data.data_ptr() + start, 2 * mmap.PAGESIZE)
    zeros = (data == 0).nonzero()
    assert len(zeros) == mmap.PAGESIZE and (data.data_ptr() + int(zeros[0])) % mmap.PAGESIZE == 0
    assert not return_pages(data.data_ptr() + start, mmap.PAGESIZE)
    assert int((data == 0).sum()) == mmap.PAGESIZE


def test_memory_that_cannot_be_taken_again_leaves_the_engine_suspended():
    class Full(KeptCache):
        is_full = True

        def restore(self) -> None:
            if self.is_full:
                raise RuntimeError("the KV cache does not fit")

    cache = Full()
    activity = Activity(cache)
    activity.suspend()
    with pytest.raises(RuntimeError, match="does not fit"), activity.sampling():
        pass
    assert activity.is_suspended
    cache.is_full = False
    with activity.sampling():
        assert not activity.is_suspended
    activity.suspend()


def test_a_failed_step_leaves_no_request_behind(engine, monkeypatch):
    expected = sampled(engine)
    worker = engine._engine.model_executor.driver_worker.worker

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    for sample in (lambda: engine.prompt_logprobs(PROMPTS), lambda: sampled(engine)):
        with monkeypatch.context() as patch:
            patch.setattr(worker.model_runner, "execute_model", fail)
            with pytest.raises(EngineError, match="out of luck"):
                sample()
        assert not engine._engine.has_unfinished_requests()
        engine.publish(lambda: None)
        engine.suspend()
        assert [[c.token_ids for c in g.completions] for g in sampled(engine)] == [
            [c.token_ids for c in g.completions] for g in expected
        ]


def test_an_engine_is_closed_in_every_state_and_followed_by_another(make_engine, engine_shelf):
    engine = make_engine(rollout=ROLLOUT)
    iterator = iter(engine.rollout([[5]] * 33, SAMPLING))  # 32 at a time: some are not begun when the first group ends
    next(iterator)
    engine_shelf.close()
    with pytest.raises(EngineError, match="closed in the middle"):
        list(iterator)
    second = make_engine(rollout=ROLLOUT)
    second.suspend()
    engine_shelf.close()
    assert not second.is_suspended
    third = make_engine(rollout=ROLLOUT)
    assert len(sampled(third)) == 3


def test_with_the_option_off_the_memory_stays(make_engine):
    engine = make_engine(rollout=ROLLOUT.model_copy(update={"release_kv_cache": False}))
    before = resident_of_cache(engine)
    engine.suspend()
    assert engine.is_suspended and resident_of_cache(engine) == before > 0.9 * cache_of(engine).nbytes()
