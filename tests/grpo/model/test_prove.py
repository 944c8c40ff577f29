"""The start-up proof on the torch engine: what an engine can do wrong while it samples only, and engines that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import SAMPLING, prove_slots
from rankup.rollout.torch_engine import TorchEngine
from rankup.rollout.types import EngineError, PromptGroup

Adapter = list[tuple[torch.Tensor, torch.Tensor]]
Choose = Callable[[list[Adapter]], Adapter]


class StaleSampler(TorchEngine):
    """It computes prompts with the adapter in the slots, but samples with one of those that were published so far."""

    def __init__(self, policy: Policy, model_path: str, sampled_with: Choose) -> None:
        super().__init__(policy, model_path, max_num_seqs=8, max_model_length=64)
        self.sampled_with = sampled_with
        self.published: list[Adapter] = [self._read()]

    def publish(self, write_slots: Callable[[], None]) -> int:
        version = super().publish(write_slots)
        self.published.append(self._read())
        return version

    def rollout(self, prompts: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> Iterator[PromptGroup]:
        self._write(self.sampled_with(self.published))
        groups = list(super().rollout(prompts, *arguments, **options))
        self._write(self.published[-1])
        yield from groups

    def _read(self) -> Adapter:
        return [(slot.a.clone(), slot.b.clone()) for slot in self.slots.values()]

    def _write(self, adapter: Adapter) -> None:
        for slot, (a, b) in zip(self.slots.values(), adapter, strict=True):
            slot.a.copy_(a)
            slot.b.copy_(b)


@pytest.fixture
def sampler(make_policy, tiny_model_path) -> Callable[..., tuple[Policy, StaleSampler]]:
    def make(sampled_with: Choose, **options: Any) -> tuple[Policy, StaleSampler]:
        policy: Policy = make_policy("llama", **options)
        return policy, StaleSampler(policy, str(tiny_model_path("llama")), sampled_with)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_adapters_are_sampled_with(sampler, dtype: str) -> None:
    proofs = prove_slots(*sampler(lambda published: published[-1], dtype=dtype))
    assert [proof.what for proof in proofs] == ["all projections", *SAMPLING]
    assert all(proof.gap < (0.1 if dtype == "bfloat16" else 1e-3) * proof.effect for proof in proofs), proofs


STALE: dict[str, tuple[Choose, int]] = {
    "the one before": (lambda published: published[-2] if len(published) > 1 else published[0], 1),
    "that of the start": (lambda published: published[0], 2),
    "the first of the proof": (lambda published: published[1] if len(published) > 1 else published[0], 1),
}
"""Which adapter is sampled with, and how many comparisons show it. The first adapter of the proof is published twice."""


@pytest.mark.parametrize(("sampled_with", "failures"), STALE.values(), ids=STALE)
def test_an_adapter_that_is_stale_while_sampling_only_is_found(sampler, sampled_with: Choose, failures: int) -> None:
    match = rf"sampling with .* differ by .*\({failures} of 3 comparisons failed\).*Only what it samples .*enforce_eager=true"
    with pytest.raises(RuntimeError, match=match):
        prove_slots(*sampler(sampled_with))


def test_an_engine_that_fails_is_not_asked_to_publish_again(sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of that would take the place of the reason."""
    policy, engine = sampler(lambda published: published[-1])
    before = [master.detach().clone() for master in policy.masters]
    prompt_logprobs = engine.prompt_logprobs

    def fail(sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
        if not use_adapter:
            return prompt_logprobs(sequences, use_adapter=use_adapter)
        monkeypatch.setattr(engine, "publish", lambda _: pytest.fail("published after the engine had failed"))
        raise EngineError("out of memory")

    monkeypatch.setattr(engine, "prompt_logprobs", fail)
    with pytest.raises(EngineError, match="out of memory"):
        prove_slots(policy, engine)
    assert all(torch.equal(one, other) for one, other in zip(before, policy.masters, strict=True))
