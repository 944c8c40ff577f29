"""Which checkpoint a run resumes from, and which changes are refused: without an engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rankup import GRPOConfig
from rankup.grpo.checkpoint.resume import config_changes, find_resumption
from rankup.grpo.checkpoint.state import STATE, Position, RunState
from rankup.grpo.checkpoint.store import CheckpointStore
from rankup.grpo.config import dump_config

INPUTS = {"reward functions": ["brief"]}


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rankup")


def config(output_dir: Path, **options: Any) -> GRPOConfig:
    values: dict[str, Any] = {"model": "smollm2-135m-instruct", "output_dir": output_dir, "max_steps": 6, **options}
    return GRPOConfig(**values)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """With a checkpoint of step 4 of a run with rank 32."""
    position = Position(steps_done=4, evaluation_pending=False, num_tokens=100, random_states=[])
    state = RunState(position=position, policy_version=5, guards={}, recorder={}, inputs=INPUTS, made_with={})

    def fill(folder: Path) -> None:
        (folder / "config.yaml").write_text(dump_config(config(tmp_path, rank=32)))
        (folder / STATE).write_text(json.dumps(dataclasses.asdict(state)))

    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_best=0)
    store.write(4, fill)
    return store


def test_an_unchanged_run_resumes_from_its_newest_checkpoint(store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    unchanged = config(store.folder.parent, rank=32)
    for source in (True, store.folder / "step_000004"):
        resumption = find_resumption(source, unchanged, store, inputs=INPUTS, allow_changes=False)
        assert resumption is not None and resumption.state.position.steps_done == resumption.checkpoint.step == 4
    for source in (False, None):
        assert find_resumption(source, unchanged, store, inputs=INPUTS, allow_changes=False) is None
    assert caplog.messages == []


def test_a_run_without_checkpoints_starts_from_scratch(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = CheckpointStore(tmp_path / "missing", keep_last=1, keep_best=0)
    assert find_resumption(True, config(tmp_path), store, inputs=INPUTS, allow_changes=False) is None
    assert caplog.messages == [f"no checkpoint in {tmp_path / 'missing'}: starting from scratch"]


def test_changes_are_refused_with_all_differences_and_allowed_with_the_option(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    changed = config(store.folder.parent, rank=32, beta=0.5, save_steps=2)
    inputs = {"reward functions": ["long"]}
    with pytest.raises(ValueError, match="the configuration, data or code differ") as caught:
        find_resumption(True, changed, store, inputs=inputs, allow_changes=False)
    differences = [
        "algorithm.beta: 0.0 in the checkpoint, 0.5 now",
        "reward functions: ['brief'] in the checkpoint, ['long'] now",
    ]
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == differences and caplog.messages == []
    assert find_resumption(True, changed, store, inputs=inputs, allow_changes=True) is not None
    changes = ["checkpoint.save_steps: 50 in the checkpoint, 2 now", *differences]
    assert caplog.messages == [f"changed since the checkpoint: {change}" for change in changes]


def test_more_steps_need_no_permission_if_the_learning_rate_is_constant(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    longer = config(store.folder.parent, rank=32, max_steps=8)
    assert find_resumption(True, longer, store, inputs=INPUTS, allow_changes=False) is not None
    assert caplog.messages == ["changed since the checkpoint: optim.max_steps: 6 in the checkpoint, 8 now"]
    decaying = config(store.folder.parent, rank=32, max_steps=8, lr_scheduler_type="linear")
    with pytest.raises(ValueError, match=r"optim.max_steps: 6 in the checkpoint, 8 now"):
        find_resumption(True, decaying, store, inputs=INPUTS, allow_changes=False)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"rank": 64}, "lora.rank: 32 in the checkpoint, 64 now"),
        ({"rank": 32, "alpha": 64}, "lora.alpha: 32.0 in the checkpoint, 64.0 now"),
        ({"rank": 32, "rank_pattern": {"q_proj": 8}}, "lora.rank_pattern.q_proj: not set in the checkpoint, 8 now"),
    ],
)
def test_another_rank_or_scale_is_refused_before_the_engine_starts(store: CheckpointStore, options: dict, difference: str):
    """Even if changes are allowed: no weights of the checkpoint fit."""
    changed = config(store.folder.parent, **options)
    with pytest.raises(ValueError, match=f"(?s)has another rank or scale:\n.*{difference}"):
        find_resumption(True, changed, store, inputs=INPUTS, allow_changes=True)


def test_an_option_that_the_checkpoint_does_not_know_yet_had_its_default(tmp_path: Path):
    older = tmp_path / "older"
    older.mkdir()
    lines = dump_config(config(tmp_path, rank=32, rank_pattern={"q_proj": 8})).splitlines()
    (older / "config.yaml").write_text("\n".join(line for line in lines if "reference:" not in line))
    same = config(tmp_path, rank=32, rank_pattern={"q_proj": 8})
    assert list(config_changes(older, same)) == []
    changed = config(tmp_path, rank=32, rank_pattern={"q_proj": 8}, reference="base")
    [change] = config_changes(older, changed)
    assert (change.option, change.before, change.now, change.affects_training) == ("algorithm.reference", "start", "base", True)


@pytest.mark.parametrize(("before", "now", "expected"), [("auto", "ignore", False), ("compare", "replay", True)])
def test_what_is_done_with_experts_changes_training_only_if_they_are_replayed(
    tmp_path: Path, before: str, now: str, expected: bool
):
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.yaml").write_text(dump_config(config(tmp_path, routed_experts=before)))
    [change] = config_changes(older, config(tmp_path, routed_experts=now))
    assert (change.option, change.affects_training) == ("rollout.routed_experts", expected)
