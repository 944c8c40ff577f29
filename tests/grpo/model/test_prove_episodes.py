"""Rule 13: the start-up proof covers an episode. What can be wrong about one is found before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rankup.grpo.episodes.stream import Stream
from rankup.grpo.model.prove import prove_slots
from rankup.rollout.torch_batch import Batch, Kept
from rankup.rollout.torch_engine import TorchEngine

Prove = Callable[..., None]


@pytest.fixture
def prove(make_policy, tiny_model_path) -> Prove:
    """The proof of a run with episodes, on the torch engine."""

    def proven(kind: str = "llama", *, episodes: bool = True, **options: Any) -> None:
        policy = make_policy(kind, **options)
        engine = TorchEngine(policy, str(tiny_model_path(kind)), max_num_seqs=6, max_model_length=64)
        before = [master.detach().clone() for master in policy.masters]
        try:
            prove_slots(policy, engine, episodes=episodes)
        finally:
            assert all(torch.equal(one, other) for one, other in zip(before, policy.masters, strict=True))

    return proven


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "mistral"])
def test_rule_13_episodes_are_what_trainer_and_engine_compute(prove: Prove, kind: str, dtype: str) -> None:
    prove(kind, dtype=dtype)


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # with shared prompts, and padded
def test_given_tokens_that_are_shifted_by_one_are_found(
    prove: Prove, monkeypatch: pytest.MonkeyPatch, kind: str, by: int
) -> None:
    give = Stream.give

    def shifted(stream: Stream, token_ids: Sequence[int]) -> None:
        give(stream, token_ids)
        start, end = stream.given.pop()
        stream.given.append((start + by, end + by) if start + by else (start, end))

    monkeypatch.setattr(Stream, "give", shifted)
    with pytest.raises(RuntimeError, match="what is stored of an episode is not what the engine computes"):
        prove(kind)
    prove(kind, episodes=False)  # a run without episodes does not need them


def test_what_the_trainer_alone_takes_otherwise_is_found(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankup.grpo.model import prove as module

    def shifted(*arguments: Any, **options: Any) -> list[Any]:
        packs = pack(*arguments, **options)
        for one in packs:
            one.sources.rows_N.copy_((one.sources.rows_N - 1).clamp(min=0))
        return packs

    pack, calls = module.pack, []

    def second_time(*arguments: Any, **options: Any) -> list[Any]:
        """The first calls are those of the proof without episodes."""
        calls.append(1)
        return (shifted if len(calls) > 2 else pack)(*arguments, **options)

    monkeypatch.setattr(module, "pack", second_time)
    with pytest.raises(RuntimeError, match="is not what the trainer computes"):
        prove()


def test_keys_and_values_that_are_kept_wrongly_are_found(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Batch.keep

    def other(batch: Batch, place: int, num_tokens: int) -> Kept:
        kept = keep(batch, place, num_tokens)
        return Kept(tuple((keys.roll(1, dims=2), values) for keys, values in kept.layers), num_tokens)

    monkeypatch.setattr(Batch, "keep", other)
    with pytest.raises(RuntimeError, match="is not what the engine computes"):
        prove()
