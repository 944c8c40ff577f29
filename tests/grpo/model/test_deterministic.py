"""Gradients on CUDA that are the same each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.packing import pack, pad
from rankup.grpo.model.policy import Policy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_deterministic_backward_on_cuda_is_repeated_bit_for_bit(
    kind: str, tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation is refused by torch's deterministic mode, which is left again. `falcon` has one row per completion."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    policy = Policy(str(tiny_model_path(kind)), lora=LoraConfig(rank=16), device="cuda", deterministic=True)
    groups = random_groups([(5, [4, 1, 6]), (3, [7])])
    make = pack if policy.shares_prompts else partial(pad, pad_token_id=0)
    (one,) = make(groups, tokens_per_pack=99, device="cuda")
    gradients = []
    for _ in range(2):
        policy.model.zero_grad(set_to_none=True)
        policy.backward(one, lambda logprobs_n, *_: -logprobs_n)
        assert not torch.are_deterministic_algorithms_enabled()
        gradients.append([parameter.grad for parameter in policy.masters])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
