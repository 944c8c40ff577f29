"""Tiny models of all families: gradients and log-probabilities of stock PEFT, and completions that do not see one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_family
from family_checks import SHAPES, gradient_error, gradient_limit, leak, logprob_error, own_pass, stock_pass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_groups import random_groups

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.policy import Policy

pytestmark = pytest.mark.slow

LENGTHS = st.integers(1, 20)
Of = Callable[[str], tuple[Policy, Path]]


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory) -> Of:
    """A function from a family to a policy on a tiny model of it, with a strong adapter, and the model's folder."""
    made: dict[str, tuple[Policy, Path]] = {}

    def get(family: str) -> tuple[Policy, Path]:
        if family not in made:
            made.clear()
            folder = make_family(tmp_path_factory.mktemp(family.replace(".", "-")) / "model", family)
            policy = Policy(str(folder), lora=LoraConfig(rank=8, alpha=8), dtype="float32")
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for layer in policy.layers.values():
                    b = layer.master_b
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
            policy.write_slots()
            made[family] = policy, folder
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_stock_peft(policy_of: Of, tmp_path: Path, family: str):
    policy, folder = policy_of(family)
    policy.save_adapter(tmp_path / "adapter")
    groups = random_groups(SHAPES)
    own, stock = own_pass(policy, groups), stock_pass(folder, tmp_path / "adapter", groups)
    assert logprob_error(own, stock) < 1e-4
    assert gradient_error(own, stock) < gradient_limit(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_does_not_see_the_others(policy_of: Of, family: str):
    policy, _ = policy_of(family)

    @settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(
        shapes=st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=3)), min_size=2, max_size=3),
        seed=st.integers(0, 1000),
        data=st.data(),
    )
    def check(shapes: list[tuple[int, list[int]]], seed: int, data: st.DataObject) -> None:
        # One token is a target but never an input: two make a difference.
        groups = random_groups([(prompt, [length + 1 for length in lengths]) for prompt, lengths in shapes], seed=seed)
        group = data.draw(st.integers(0, len(groups) - 1))
        completion = data.draw(st.integers(0, len(groups[group].completions) - 1))
        assert leak(policy, groups, group=group, completion=completion) < 1e-5

    check()
