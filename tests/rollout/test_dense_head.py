"""The dense product on the LM head, without vLLM: rows that use the adapter, and the padding of the vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.rollout.dense_lora import DenseHead, wrapper_name

D, V, PADDED, R = 8, 11, 16, 4


class FakePunica:
    """The part of vLLM's wrappers that `DenseHead` uses: the adapter (0, or -1 for none) of every token and request."""

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        self.token_lora_indices = torch.tensor(mapping.index_mapping) - 1
        self.sampler_indices = torch.tensor(mapping.prompt_mapping) - 1


class Wrapper(DenseHead, FakePunica): ...


@settings(deadline=None)
@given(requests=st.lists(st.tuples(st.integers(1, 7), st.sampled_from([0, 1])), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_only_rows_of_requests_with_the_adapter_change(requests: list[tuple[int, int]], seed: int) -> None:
    """A step as in vLLM: logits of each request's last token, then those of all but the last token of each prompt."""
    torch.manual_seed(seed)
    lengths, adapters = [length for length, _ in requests], [adapter for _, adapter in requests]
    index_mapping = [adapter for length, adapter in requests for _ in range(length)]
    wrapper = Wrapper()
    mapping: Any = SimpleNamespace(index_mapping=index_mapping, prompt_mapping=adapters)
    wrapper.update_metadata(mapping, [1], 2, V)
    hidden_TD, a, b = torch.randn(sum(lengths), D), torch.randn(1, 1, R, D), torch.randn(1, 1, V, R)
    update_TV = hidden_TD.double() @ a[0, 0].t().double() @ b[0, 0].t().double() * torch.tensor(index_mapping)[:, None]

    ends = torch.tensor(lengths).cumsum(0)
    rows_of_calls = [(hidden_TD[ends - 1], update_TV[ends - 1])]
    for length, end in zip(lengths, ends.tolist(), strict=True):
        prompt = slice(end - length, end - 1)
        rows_of_calls.append((hidden_TD[prompt], update_TV[prompt]))
    for x_ND, update_NV in rows_of_calls:
        before = torch.randn(len(x_ND), PADDED)
        logits = before.clone()
        wrapper.add_lora_logits(logits, x_ND, a, b, 1.0)
        torch.testing.assert_close(logits[:, :V].double(), before[:, :V] + update_NV, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits[:, V:], before[:, V:])


def test_logits_may_be_wider_than_the_hidden_state() -> None:
    """vLLM can compute logits in fp32 from a bf16 model (`head_dtype`)."""
    wrapper = Wrapper()
    mapping: Any = SimpleNamespace(index_mapping=[1, 1], prompt_mapping=[1])
    wrapper.update_metadata(mapping, [1], 2, V)
    x, a, b = torch.randn(2, D).bfloat16(), torch.randn(1, 1, R, D).bfloat16(), torch.randn(1, 1, V, R).bfloat16()
    logits = torch.zeros(2, PADDED)
    wrapper.add_lora_logits(logits, x, a, b, 1.0)
    h = x @ a[0, 0].t()
    torch.testing.assert_close(logits[:, :V], h.float() @ b[0, 0].t().float())


@pytest.mark.parametrize(
    ("device", "dense", "head", "expected"),
    [
        ("cpu", True, False, "DensePunicaWrapperCPU"),
        ("cuda", True, True, "DensePunicaWrapperGPU"),
        ("cpu", False, True, "DenseHeadPunicaWrapperCPU"),
        ("cuda", False, True, "DenseHeadPunicaWrapperGPU"),
        ("cuda", False, False, None),
        ("tpu", False, False, None),
    ],
)
def test_the_wrapper_for_each_device_and_path(device: str, dense: bool, head: bool, expected: str | None) -> None:
    name = wrapper_name(device, dense=dense, head=head)
    assert name == (expected and f"rankup.rollout.dense_lora.{expected}")


@pytest.mark.parametrize(("dense", "remedy"), [(True, "set rollout.lora_path: punica"), (False, "remove lm_head from lora")])
def test_a_device_without_a_dense_path_is_an_error(dense: bool, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^there is no dense LoRA path for device 'tpu': {remedy}"):
        wrapper_name("tpu", dense=dense, head=True)
