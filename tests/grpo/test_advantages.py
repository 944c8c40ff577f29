"""Advantages of groups, against the formulas written out with torch as TRL has them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.advantages import group_advantages

Scale = Literal["group", "batch", "none"]

REWARDS = st.floats(-10, 10).map(lambda reward: round(reward, 2))
GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.none() | REWARDS, min_size=size, max_size=size), min_size=1, max_size=4)
)


def nan_std(rewards: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Standard deviation of a sample (n - 1) over what is not nan; nan below two values."""
    count = rewards.isfinite().sum(dim)
    mean = rewards.nanmean() if dim is None else rewards.nanmean(dim, keepdim=True)
    return (((rewards - mean) ** 2).nansum(dim) / (count - 1).clamp(min=0)).sqrt()


def expected_advantages(rewards: list[list[float | None]], scale: Scale) -> torch.Tensor:
    table_BG = torch.tensor([[float("nan") if r is None else r for r in group] for group in rewards], dtype=torch.float64)
    centred_BG = table_BG - table_BG.nanmean(1, keepdim=True)
    if scale == "group":
        centred_BG /= nan_std(table_BG, dim=1).nan_to_num(0.0)[:, None] + 1e-4
    elif scale == "batch":
        centred_BG /= nan_std(table_BG).nan_to_num(0.0) + 1e-4
    return centred_BG.nan_to_num(0.0)


@settings(deadline=None)
@given(rewards=GROUPS, scale=st.sampled_from(["group", "batch", "none"]))
def test_formulas(rewards: list[list[float | None]], scale: Scale) -> None:
    results = group_advantages(rewards, scale_rewards=scale)
    measured = torch.tensor([result.advantages for result in results], dtype=torch.float64)
    torch.testing.assert_close(measured, expected_advantages(rewards, scale), rtol=1e-6, atol=1e-6)
    for result, group in zip(results, rewards, strict=True):
        known = torch.tensor([r for r in group if r is not None], dtype=torch.float64)
        assert result.mean == pytest.approx(known.mean().item() if len(known) else 0.0, abs=1e-9)
        assert result.std == pytest.approx(known.std().item() if len(known) > 1 else 0.0, abs=1e-9)
        assert result.has_variance == (len(set(known.tolist())) > 1)


def test_an_example_by_hand() -> None:
    first, second = group_advantages([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]], scale_rewards="group")
    std = (1 / 3) ** 0.5
    assert first.advantages == pytest.approx([s * 0.5 / (std + 1e-4) for s in (1, -1, -1, 1)])
    assert (first.mean, first.std, first.has_variance) == (0.5, pytest.approx(std), True)
    assert (second.advantages, second.mean, second.has_variance) == ((0.0,) * 4, 3.0, False)


def test_a_completion_without_a_reward_is_left_out() -> None:
    (with_none,) = group_advantages([[1.0, None, 0.0]], scale_rewards="group")
    (without,) = group_advantages([[1.0, 0.0]], scale_rewards="group")
    assert with_none.advantages == (without.advantages[0], 0.0, without.advantages[1])
    assert (with_none.mean, with_none.std) == (without.mean, without.std)


@pytest.mark.parametrize("rewards", [[None, None], [1.0, None], []])
def test_fewer_than_two_rewards_teach_nothing(rewards: list[float | None]) -> None:
    (result,) = group_advantages([rewards], scale_rewards="group")
    assert result.advantages == (0.0,) * len(rewards)
    assert (result.std, result.has_variance) == (0.0, False)


def test_equal_rewards_that_binary_cannot_hold_have_no_variance() -> None:
    (result,) = group_advantages([[0.1] * 7], scale_rewards="group")
    assert not result.has_variance
    assert max(map(abs, result.advantages)) < 1e-9
