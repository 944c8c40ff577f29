"""Advantages of groups, against the formulas written out with torch as TRL has them."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.algorithm.advantages import ESTIMATORS, group_advantages, normalized_sums, soft_overlong_penalty
from rankup.grpo.config.algorithm import ESTIMATORS as ESTIMATOR_NAMES

Scale = Literal["group", "batch", "none"]

REWARDS = st.floats(-10, 10).map(lambda reward: round(reward, 2))
GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.none() | REWARDS, min_size=size, max_size=size), min_size=1, max_size=4)
)


def nan_std(rewards: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Standard deviation of a sample (n - 1) over the values that are not nan; nan below two values."""
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
        assert result.std == pytest.approx(known.std().item() if len(known) > 1 else 0.0, abs=1e-9)
        assert result.has_variance == (len(set(known.tolist())) > 1)


def test_an_example_by_hand() -> None:
    first, second = group_advantages([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]], scale_rewards="group")
    std = (1 / 3) ** 0.5
    assert first.advantages == pytest.approx([s * 0.5 / (std + 1e-4) for s in (1, -1, -1, 1)])
    assert (first.std, first.has_variance) == (pytest.approx(std), True)
    assert (second.advantages, second.has_variance) == ((0.0,) * 4, False)


def test_a_completion_without_a_reward_is_left_out() -> None:
    (with_none,) = group_advantages([[1.0, None, 0.0]], scale_rewards="group")
    (without,) = group_advantages([[1.0, 0.0]], scale_rewards="group")
    assert with_none.advantages == (without.advantages[0], 0.0, without.advantages[1])
    assert with_none.std == without.std


@pytest.mark.parametrize("rewards", [[None, None], [1.0, None], []])
def test_fewer_than_two_rewards_have_zero_advantages(rewards: list[float | None]) -> None:
    (result,) = group_advantages([rewards], scale_rewards="group")
    assert result.advantages == (0.0,) * len(rewards)
    assert (result.std, result.has_variance) == (0.0, False)


def test_equal_rewards_that_binary_cannot_hold_have_no_variance() -> None:
    (result,) = group_advantages([[0.1] * 7], scale_rewards="group")
    assert not result.has_variance
    assert max(map(abs, result.advantages)) < 1e-9


# ------------------------------------------------------------------------------------------------ other estimators

NOT_NEGATIVE = st.lists(
    st.lists(st.none() | st.floats(0, 5).map(lambda reward: round(reward, 2)), min_size=2, max_size=5), min_size=1, max_size=4
)


def by_estimator(estimator: str, group: list[float], batch: list[float]) -> list[float]:
    """The definitions, number by number."""
    advantages = []
    for i, reward in enumerate(group):
        others = group[:i] + group[i + 1 :]
        mean = sum(group) / len(group)
        advantages.append(
            {
                "group": lambda r=reward, m=mean: r - m,
                "rloo": lambda r=reward, o=others: r - sum(o) / len(o) if o else 0.0,
                "reinforce_pp": lambda r=reward: r - sum(batch) / len(batch),
                "maxrl": lambda r=reward, m=mean: (r - m) / (m + 1e-4),
            }[estimator]()
        )
    return advantages


@settings(deadline=None)
@given(rewards=NOT_NEGATIVE, estimator=st.sampled_from(sorted(ESTIMATORS)), scale=st.sampled_from(["group", "batch", "none"]))
def test_estimators(rewards: list[list[float | None]], estimator: str, scale: Scale) -> None:
    """Each with each scale; only REINFORCE++ has something to say of a group without variance."""
    batch = [r for group in rewards for r in group if r is not None]
    batch_std = torch.tensor(batch, dtype=torch.float64).std().item() if len(batch) > 1 else 0.0
    for result, group in zip(
        group_advantages(rewards, estimator=estimator, scale_rewards=scale), rewards, strict=True
    ):
        known = [r for r in group if r is not None]
        std = torch.tensor(known, dtype=torch.float64).std().item() if len(known) > 1 else 0.0
        divisor = {"group": std + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        expected = iter(by_estimator(estimator, known, batch))
        if len(set(known)) < 2 and estimator != "reinforce_pp":
            expected = iter([0.0] * len(known))
        wanted = [0.0 if r is None else next(expected) / divisor for r in group]
        assert result.advantages == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("estimator", ["group", "rloo", "maxrl"])
@pytest.mark.parametrize("group", [[0.1] * 7, [0.0] * 4, [1 / 3] * 3, [None, 0.7, 0.7]])
def test_a_group_of_equal_rewards_has_exactly_zero_advantages(estimator: str, group: list[float | None]) -> None:
    (result,) = group_advantages([group], estimator=estimator, scale_rewards="group")
    assert result.advantages == (0.0,) * len(group) and not result.has_variance


def test_reinforce_pp_learns_from_groups_of_equals() -> None:
    first, second = group_advantages([[1.0, 1.0], [0.0, 0.0]], estimator="reinforce_pp", scale_rewards="none")
    assert (first.advantages, second.advantages) == ((0.5, 0.5), (-0.5, -0.5))
    assert not first.has_variance and not second.has_variance


def test_maxrl_gives_rare_successes_the_largest_advantages() -> None:
    rare, common = group_advantages([[1.0, 0, 0, 0], [1.0, 1.0, 1.0, 0]], estimator="maxrl", scale_rewards="none")
    assert rare.advantages[0] == pytest.approx(3.0, rel=1e-3) and common.advantages[0] == pytest.approx(1 / 3, rel=1e-3)


def test_maxrl_refuses_negative_rewards_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"maxrl reads rewards .* at least 0 \(got -0.5\): shift the rewards, or take another"):
        group_advantages([[1.0, -0.5]], estimator="maxrl", scale_rewards="none")


def test_every_estimator_of_the_configuration_is_there() -> None:
    assert set(ESTIMATOR_NAMES) == set(ESTIMATORS)


# --------------------------------------------------------------------------------------------------- long answers


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (80, 0.0), (85, 0.25), (90, 0.5), (100, 1.0), (120, 1.0)])
def test_the_soft_overlong_penalty_rises_to_one(length: int, penalty: float) -> None:
    measured = soft_overlong_penalty(length, max_completion_length=100, soft_tokens=20)
    assert measured == pytest.approx(penalty) and math.copysign(1.0, measured) == 1.0
    assert soft_overlong_penalty(length, max_completion_length=100, soft_tokens=0) == 0.0


OF_TWO_FUNCTIONS = st.lists(st.lists(st.none() | REWARDS, min_size=4, max_size=4), min_size=2, max_size=2)


@settings(max_examples=60)
@given(groups=st.lists(OF_TWO_FUNCTIONS, min_size=2, max_size=4))
def test_normalised_sums_are_gdpo_as_trl_has_it(groups: list[list[list[float | None]]]):
    """`groups` has rewards by group, function and completion."""
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    table_BKG = torch.tensor([[[math.nan if r is None else r for r in one] for one in g] for g in groups], dtype=torch.float64)
    centred_BKG = table_BKG - table_BKG.nanmean(2, keepdim=True)
    scaled_BKG = centred_BKG / (nan_std(table_BKG, dim=2)[..., None].nan_to_num(0.0) + 1e-4)
    sums_BG = (scaled_BKG * weights[:, None]).nansum(1)
    sums_BG[table_BKG.isnan().all(1)] = math.nan
    expected_BG = ((sums_BG - sums_BG.nanmean()) / (nan_std(sums_BG).nan_to_num(0.0) + 1e-4)).nan_to_num(0.0)

    sums = normalized_sums(groups, weights.tolist())
    result = group_advantages(sums, estimator="group", scale_rewards="batch")
    advantages_BG = torch.tensor([g.advantages for g in result], dtype=torch.float64)
    torch.testing.assert_close(advantages_BG, expected_BG, rtol=1e-6, atol=1e-6)


def test_no_function_drowns_another_and_equal_rewards_have_zero_advantages():
    large_and_small = [[[0.0, 100.0, 0.0, 100.0], [0.0, 0.0, 0.1, 0.1]], [[5.0] * 4, [0.3] * 4]]
    sums = normalized_sums(large_and_small, [1.0, 1.0])
    assert sums[0][3] is not None
    assert sums[0][0] == pytest.approx(-sums[0][3]) and sums[0][1] == pytest.approx(sums[0][2], abs=1e-2)
    result = group_advantages(sums, estimator="group", scale_rewards="batch")
    assert result[1].advantages == (0.0,) * 4, "exactly: the learner leaves out completions without an advantage"
