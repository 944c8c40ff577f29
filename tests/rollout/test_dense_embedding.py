"""The dense product on the input embedding, without vLLM: tokens that use the adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankup.rollout.dense_lora import DenseLoRA

D, R, T = 8, 4, 6


class FakePunica:
    """The part of vLLM's wrappers that `DenseLoRA` uses: the adapter (0, or -1 for none) of every token."""

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        self.token_lora_indices = torch.tensor(mapping.index_mapping) - 1


class Wrapper(DenseLoRA, FakePunica): ...


class CapturedWrapper(Wrapper):
    """As on CUDA, where a branch would be frozen into a captured graph."""

    _branch_on_coverage = False


@pytest.mark.parametrize("cls", [Wrapper, CapturedWrapper])
@pytest.mark.parametrize(
    ("adapters", "coverage"),
    [([1] * T, "all"), ([0] * T, "none"), ([1, 0, 0, 1, 1, 0], "mixed")],
    ids=["all", "none", "mixed"],
)
def test_only_tokens_of_requests_with_the_adapter_change(cls: type[Wrapper], adapters: list[int], coverage: str) -> None:
    torch.manual_seed(0)
    wrapper = cls()
    mapping: Any = SimpleNamespace(index_mapping=adapters)
    wrapper.update_metadata(mapping, [1], 2, 100)
    assert wrapper.coverage == coverage
    before, gathered, b = torch.randn(T, D), torch.randn(T, R), torch.randn(1, 1, D, R)
    y, x = before.clone(), gathered.clone()
    wrapper.add_lora_embedding(y, x, b, add_input=True)  # as vLLM calls it
    update = gathered.double() @ b[0, 0].t().double() * torch.tensor(adapters)[:, None]
    torch.testing.assert_close(y.double(), before.double() + update, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, gathered)
