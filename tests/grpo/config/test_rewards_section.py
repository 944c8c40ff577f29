"""The section `rewards`: functions as names or mappings, where they run, and what failures do."""

from __future__ import annotations

import pytest

from rankup.grpo.config import GRPOConfig, RewardFunction, dump_config
from rankup.rewards.config import RewardsConfig


def test_functions_are_names_or_mappings(load):
    config = load("rewards: {functions: [a.py:f, {function: b.py:g, kwargs: {n: 3}, weight: 0.5, isolation: process}]}")
    assert config.rewards.functions == [
        "a.py:f",
        RewardFunction(function="b.py:g", kwargs={"n": 3}, weight=0.5, isolation="process"),
    ]
    assert config.rewards.entries() == [RewardFunction(function="a.py:f"), config.rewards.functions[1]]
    assert load("rewards: {functions: {function: b.py:g}}").rewards.entries() == [RewardFunction(function="b.py:g")]


def test_a_factory_without_arguments_keeps_its_empty_mapping(load):
    (entry,) = load("rewards: {functions: {function: b.py:g, kwargs: {}}}").rewards.entries()
    assert entry.kwargs == {}


def test_a_dump_reads_back(load, tmp_path):
    config = load("rewards: {functions: [{function: b.py:g, kwargs: {n: 3}}, last_integer], on_error: -1, timeout: null}")
    assert load(dump_config(config)).rewards == config.rewards


@pytest.mark.parametrize(("value", "meant"), [("stop", "stop"), ("none", "none"), ("0", 0.0), ("-1.5", -1.5)])
def test_the_action_on_a_failure(load, value, meant):
    assert load("", f"rewards.on_error={value}").rewards.on_error == meant


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rewards.on_error=continue", "rewards.on_error"),
        ("rewards.isolation=thread", "rewards.isolation: must be 'inline', 'process' or 'ray' (got 'thread')"),
        ("rewards.timeout=0", "rewards.timeout"),
        ("rewards.functions=[{function: a.py:f, wieght: 2}]", "wieght"),
        ("rewards.functions=[{kwargs: {}}]", "function"),
        ("rewards.functions=[[3]]", "rewards.functions"),
        ("rewards.rows_per_call=0", "rewards.rows_per_call"),
    ],
)
def test_mistakes_are_named_in_one_line(error_of, override, expected):
    message = error_of("", override)
    assert expected in message and "\n" not in message


def test_weights_are_specified_once(error_of):
    text = "rewards: {functions: [{function: a.py:f, weight: 2}], weights: [1]}"
    assert error_of(text) == "rewards.weights: reward weights are specified twice: in `weights` and with the functions"


def test_trl_s_names():
    config = GRPOConfig(reward_weights=[1, 2], multi_objective_aggregation="normalize_then_sum")
    assert config.rewards == RewardsConfig(weights=[1, 2], multi_objective_aggregation="normalize_then_sum")


@pytest.mark.parametrize("option", ["soft_overlong_tokens=4", "advantage_estimator=rloo"])
def test_normalised_rewards_go_with_no_other_advantages(error_of, option):
    assert "normalize_then_sum" in error_of("", "multi_objective_aggregation=normalize_then_sum", option)
