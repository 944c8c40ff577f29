"""When snapshots are due, the values that a restore resets, checkpoints of the guards, and no alarms in a healthy run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_guards import CALM, Played, StepsOnly, after_calm, rise, triggered

from rankup.grpo.config.guards import GuardsConfig
from rankup.grpo.guards.guards import Guards
from rankup.grpo.guards.rules import RULES

HEALTHY_RUN = Path(__file__).parent / "data" / "healthy_run.json"


@pytest.fixture
def calm() -> Played:
    """After twenty calm steps: starts and running means are known."""
    return after_calm()


def healthy_steps(played: Played) -> list[int]:
    return [step for step, decision in enumerate(played.decisions) if decision.snapshot]


def test_a_healthy_run_has_a_snapshot_every_few_steps(calm: Played):
    calm.steps()
    assert healthy_steps(calm) == [0, 5, 10, 15, 20]
    assert healthy_steps(after_calm(snapshot_steps=7)) == [0, 7, 14]


def test_no_snapshot_at_an_alarm_nor_shortly_after(calm: Played):
    calm.steps(sampler_kl=0.02)
    calm.steps(10)
    assert healthy_steps(calm)[-2:] == [24, 29]  # the alarm was at 20


def test_no_snapshot_while_a_value_is_beyond_its_limit(calm: Played):
    assert not any(decision.snapshot for decision in calm.steps(30, sampler_kl=0.02))


def test_no_snapshot_while_the_reward_is_below_its_best():
    played = Played(reward_watch=None, reward_stop=None)
    rise(played)
    played.steps(30, reward=0.8)
    fallen = [decision.snapshot for decision in played.steps(30, reward=0.6)]
    assert not any(fallen)
    assert any(decision.snapshot for decision in played.steps(30, reward=0.8))


def test_a_decline_within_the_noise_is_not_healthy():
    """Rewards of a run whose rate rose too high: at its best in step 10, fallen from step 12 on."""
    rewards = [0.031, 0.016, 0.031, 0.094, 0.156, 0.141, 0.188, 0.297, 0.516, 0.203, 0.516, 0.328, 0.109, 0.25, 0.141, 0.078]
    played = Played()
    for reward in [*rewards, 0.172, 0.391, 0.375, 0.188]:
        played.steps(reward=reward)
    assert max(healthy_steps(played)) <= 11


def test_a_restore_puts_the_running_means_back():
    played = Played()
    rise(played)
    played.steps(5, reward=0.8, entropy=0.05)
    saved = json.loads(json.dumps(played.guards.state_dict()))["taken"]["step"]["trackers"]
    assert any(decision.restore for decision in played.steps(10, reward=0.1, entropy=0.05)[:5])
    played.guards.restore("step")
    state = played.guards.state_dict()
    assert state["trackers"] == saved == state["taken"]["step"]["trackers"]
    assert played.guards.learning_rate_factor < 1
    assert triggered(played.steps(20, reward=0.8, entropy=0.05)) == []


def test_a_run_ends_with_the_snapshot_if_its_reward_has_fallen():
    played = Played(reward_stop=None)
    rise(played)
    played.steps(30, reward=0.8)
    assert played.guards.final_snapshot() is None
    played.steps(15, reward=0.5)
    assert played.guards.final_snapshot() == "step"
    played.steps(20, reward=0.8)
    assert played.guards.final_snapshot() is None
    assert Guards(GuardsConfig(), StepsOnly()).final_snapshot() is None


# Resuming, and a run that was healthy


def step_values() -> st.SearchStrategy[dict[str, float | None]]:
    usual = {name: st.floats(0.5 * value, 1.5 * value) for name, value in CALM.items()}
    wild = st.one_of(st.floats(0, 5), st.sampled_from([None, math.nan, math.inf]))
    return st.fixed_dictionaries({name: st.one_of(values, wild) for name, values in usual.items()})


@settings(max_examples=40, deadline=None)
@given(trace=st.lists(step_values(), min_size=2, max_size=40), data=st.data())
def test_guards_resume_from_a_checkpoint_without_a_difference(
    trace: list[dict[str, float | None]], data: st.DataObject
):
    cut = data.draw(st.integers(1, len(trace) - 1))
    undisturbed = Played(baseline_steps=2, snapshot_steps=2)
    for values in trace[:cut]:
        undisturbed.steps(**values)
    resumed = Played(baseline_steps=2, snapshot_steps=2)
    resumed.guards.load_state_dict(json.loads(json.dumps(undisturbed.guards.state_dict(), allow_nan=False)))
    resumed.step, resumed.snapshots.steps = undisturbed.step, dict(undisturbed.snapshots.steps)
    for values in trace[cut:]:
        assert repr(resumed.steps(**values)) == repr(undisturbed.steps(**values))  # repr: NaN is not equal to itself
    assert resumed.guards.state_dict() == undisturbed.guards.state_dict()
    assert resumed.guards.metrics() == undisturbed.guards.metrics()


def test_a_recorded_healthy_run_is_silent():
    # The first 40 steps of the quick start (seed 42): the reward goes from 0.03 to 0.75 and the entropy to a twentieth. The
    # advantages' scale is the standard deviation of rewards in a group there, which becomes five times its start.
    columns: dict[str, list[float]] = json.loads(HEALTHY_RUN.read_text())
    guards = Guards(GuardsConfig(), StepsOnly())
    decisions = []
    for step in range(40):
        decisions.append(guards.inspect(step, {name: values[step] for name, values in columns.items()}))
        guards.apply(decisions[-1])
    assert {rule.metric for rule in RULES} - columns.keys() == {"sampling/effective_sample_size"}
    assert [(decision.alarms, decision.text) for decision in decisions if decision.alarms or decision.text] == []
    assert [step for step, decision in enumerate(decisions) if decision.snapshot] == list(range(0, 40, 5))
