"""The replacement of vLLM's sampler on CUDA: where the random numbers come from. For the kernel see kernels/triton."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rankup.rollout.cuda_ops import OFFSETS, draws
from rankup.rollout.types import EngineError
from rankup.rollout.vllm_requests import VllmQueue, VllmRequests


class Generator:
    """As torch's generator of a CUDA device, which this machine may lack: those of the CPU have no offset."""

    def __init__(self, seed: int) -> None:
        self._seed, self._offset = seed, 0

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        assert offset >= 0 and offset % OFFSETS == 0
        self._offset = offset


def drawn(generators: Mapping[int, Any], rows: int) -> list[list[int]]:
    return draws(generators, rows).t().tolist()


def test_seed_and_position_are_those_of_the_request_in_any_row() -> None:
    one, other = Generator(5), Generator(2**64 - 1)
    assert drawn({0: one, 1: other}, 2) == [[5, 0], [-1, 0]]
    assert drawn({0: other}, 1) == [[-1, 1]]
    assert drawn({1: one, 0: other}, 2) == [[-1, 2], [5, 1]]


def test_a_discarded_token_is_drawn_again() -> None:
    generator = Generator(3)
    first = drawn({0: generator}, 1)
    generator.set_offset(generator.get_offset() - 4)  # as vLLM does after a chunk of a prompt
    assert drawn({0: generator}, 1) == first


def test_a_row_without_a_seed_takes_one_from_torch() -> None:
    torch.manual_seed(1)
    (first, _), seeded, (third, _) = drawn({1: Generator(9)}, 3)
    assert seeded == [9, 0] and first != third
    torch.manual_seed(1)
    assert drawn({}, 3)[0] == [first, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torchs_generators_of_the_device() -> None:
    generator = torch.Generator(device="cuda").manual_seed(11)
    assert [drawn({0: generator}, 1) for _ in range(3)] == [[[11, 0]], [[11, 1]], [[11, 2]]]


def test_a_token_from_logits_that_are_not_finite_is_an_error() -> None:
    def ends_with(logprob: float) -> Any:
        flat = SimpleNamespace(logprobs=[-1.0, logprob, -2.0])
        output = SimpleNamespace(finished=True, request_id="a", outputs=[SimpleNamespace(logprobs=flat)])
        requests = VllmRequests(VllmQueue(cast(Any, None), nullcontext), cast(Any, None))
        requests._keys = {"a": 3}
        requests.take(cast(Any, output))
        return requests.step()

    assert [key for key, _ in ends_with(-0.5)] == [3]
    with pytest.raises(EngineError, match="logits are not finite, so nothing can be sampled"):
        ends_with(float("nan"))
