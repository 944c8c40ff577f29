"""The numbers that follow are those that followed then."""

import base64
import json
import random

import numpy as np
import pytest
import torch

from rankup.grpo.common.random_states import preserved_random_states, random_states, set_random_states


def draws() -> list[float]:
    """Of every generator, also those that keep a second normal number for the next call."""
    of_torch = [torch.rand(()).item(), torch.randn(3).sum().item()]
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *of_torch]


def test_all_generators_resume_at_their_state():
    before = random_states()
    try:
        draws()  # an odd number of normal ones: the second of a pair is waiting
        state = json.loads(json.dumps(random_states()))
        first = draws()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        assert draws() != first
        set_random_states(state)
        assert draws() == first
    finally:
        set_random_states(before)


def test_what_draws_in_a_pause_goes_on_where_the_generators_were_before():
    before = random_states()
    try:
        set_random_states(before)
        expected = [draws(), draws()]
        set_random_states(before)
        with preserved_random_states(seed=7) as states:
            first = draws()
            with states.paused():
                outside = draws()
            second = draws()
        assert [outside, draws()] == expected
        with preserved_random_states(seed=7):
            assert [draws(), draws()] == [first, second]
    finally:
        set_random_states(before)


class OneGpuOf:
    """Stands for torch's CUDA generators on a machine with several GPUs, of which this process uses one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, gpus: int, current: int = 0) -> None:
        self.states = [torch.full((16,), index, dtype=torch.uint8) for index in range(gpus)]
        for name, replacement in {
            "is_initialized": lambda: True,
            "is_available": lambda: True,
            "current_device": lambda: current,
            "get_rng_state": lambda: self.states[current].clone(),
            "set_rng_state": lambda state: self.states.__setitem__(current, state),
            "get_rng_state_all": lambda: pytest.fail("other GPUs are not this process's"),
            "set_rng_state_all": lambda states: pytest.fail("other GPUs are not this process's"),
            "manual_seed": lambda seed: self.states.__setitem__(current, torch.full((16,), seed, dtype=torch.uint8)),
            "manual_seed_all": lambda seed: pytest.fail("other GPUs are not this process's"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)


def test_the_state_of_this_process_s_gpu_alone_is_saved_and_restored_with_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        OneGpuOf(patch, gpus=4, current=2)
        saved = random_states()
    assert len(saved["cuda"]) == 1
    with monkeypatch.context() as patch:
        one = OneGpuOf(patch, gpus=1)
        set_random_states(saved)
        assert one.states[0].tolist() == [2] * 16


def test_states_that_were_saved_for_every_gpu_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    of_four = [base64.b64encode(bytes([index] * 16)).decode() for index in range(4)]
    for gpus, current, expected in ((4, 1, 1), (8, 6, 3), (1, 0, 0)):
        with monkeypatch.context() as patch:
            machine = OneGpuOf(patch, gpus=gpus, current=current)
            set_random_states(random_states() | {"cuda": of_four})
            assert machine.states[current].tolist() == [expected] * 16


def test_a_block_leaves_other_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = OneGpuOf(monkeypatch, gpus=2, current=1)
    with preserved_random_states(seed=7):
        assert machine.states[1].tolist() == [7] * 16
    assert [state[0].item() for state in machine.states] == [0, 1]
