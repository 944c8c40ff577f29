"""Random adapters in an engine's slots, and the reference: the transformers model with the slots merged into its weights.

    publish_random(engine, ["lm_head"])                  # an adapter on lm_head only
    MergedModel(folder, engine.slots).logprobs([5, 9])   # fp64
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

RANK = 16
_NUMBERS = itertools.count()


def publish_random(engine: Any, names: Container[str], seed: int = 0) -> None:
    """Publish random adapters in the slots with these names, and zeros in all others."""
    import torch

    def write_slots() -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, slot in engine.slots.items():
            slot.a.zero_()
            slot.b.zero_()
            if name in names:
                slot.a[:RANK] = torch.randn(RANK, slot.a.shape[1], generator=generator) / slot.a.shape[1] ** 0.5
                slot.b[:, :RANK] = torch.randn(slot.b.shape[0], RANK, generator=generator) * 0.2

    engine.publish(write_slots)


class MergedModel:
    """The model in fp64 with the slots merged into its weights."""

    def __init__(self, folder: Path, slots: Any) -> None:
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for name, slot in slots.items():
            layer = self.model.get_submodule(name)
            update = slot.b.double() @ slot.a.double()
            # A new parameter, so that a tied weight does not change.
            layer.weight = nn.Parameter(layer.weight.detach() + (update.t() if isinstance(layer, nn.Embedding) else update))

    def logprobs(self, ids: list[int]) -> list[float]:
        """Log-probability of every token but the first."""
        import torch

        with torch.no_grad():
            log_p = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def flat(logprobs: list[list[float]]) -> list[float]:
    """The log-probabilities of all sequences in one list."""
    return [lp for sequence in logprobs for lp in sequence]


def add_request(engine: Any, ids: Sequence[int], params: Any, *, use_adapter: bool) -> str:
    """Add a request to vLLM, in a batch that may have requests with and without the adapter; returns its name."""
    name = f"mixed-{next(_NUMBERS)}"
    lora_request = engine._lora_request if use_adapter else None
    engine._engine.add_request(name, {"prompt_token_ids": list(ids)}, params, lora_request=lora_request)
    return name


def assert_a_mixed_batch_agrees(engine: Any, folder: Path, lengths: Sequence[int], *, tolerance: float) -> None:
    """Every other prompt of a batch uses the adapter; compare log-probabilities of prompts and sampled tokens."""
    import pytest
    from vllm import SamplingParams

    oracles = {True: MergedModel(folder, engine.slots), False: MergedModel(folder, {})}
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0, logprobs=0)
    prompts, outputs = {}, {}
    for i, length in enumerate(lengths):
        ids = [5 + (31 * i + 7 * j) % 250 for j in range(length)]
        prompts[add_request(engine, ids, params, use_adapter=i % 2 == 0)] = ids, i % 2 == 0
    while len(outputs) < len(prompts):
        outputs |= {output.request_id: output for output in engine._engine.step() if output.finished}
    for name, (ids, use_adapter) in prompts.items():
        sampled = outputs[name].outputs[0]
        tokens = [*ids, *sampled.token_ids]
        candidates = [*outputs[name].prompt_logprobs[1:], *sampled.logprobs]
        got = [of_token[token].logprob for of_token, token in zip(candidates, tokens[1:], strict=True)]
        assert got == pytest.approx(oracles[use_adapter].logprobs(tokens), abs=tolerance)
