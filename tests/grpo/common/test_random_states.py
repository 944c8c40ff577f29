"""The numbers that follow are those that followed then."""

import json
import random

import numpy as np
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
