"""Rewards in processes during a run with real vLLM: a call that hangs costs its rows, marked as failed; the run continues."""

from __future__ import annotations

import os
import time

import pyarrow.parquet
import pytest
from tiny_runs import steps_of

from rankup.rewards.contract import RewardError

PROCESS = {"isolation": "process", "num_workers": 2}


def test_a_reward_that_hangs_costs_its_rows_and_the_run_continues(make_trainer, tmp_path, capsys):
    def hangs_on_three(completion_ids, target, **kwargs):
        if target[0] == 3:
            time.sleep(600)
        return [float(len(set(ids))) for ids in completion_ids]

    trainer = make_trainer(
        reward=hangs_on_three, **PROCESS, timeout=3.0, on_error="none", max_steps=4, eval_before=False, completions_steps=1
    )
    trainer.train()
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 4
    tables = [pyarrow.parquet.read_table(path) for path in sorted((tmp_path / "run" / "completions").iterdir())]
    rows = [row for table in tables for row in table.to_pylist()]
    marked = [row for row in rows if row.get("hangs_on_three/error")]
    assert marked and all(row["target"] == 3 and row["reward"] is None and row["advantage"] == 0 for row in marked)
    assert all("no answer in 3 s" in row["hangs_on_three/error"] for row in marked)
    assert all(row["reward"] is not None for row in rows if row["target"] != 3)
    assert any(step.get("rewards/hangs_on_three/failed_ratio") for step in steps)
    assert "reward function 'hangs_on_three' failed on 4 completions: no answer in 3 s" in capsys.readouterr().out


@pytest.mark.ray
def test_the_same_run_in_processes_and_in_ray_as_inline(make_trainer, tmp_path):
    def low(completion_ids, **kwargs):
        return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

    rewards = []
    for isolation in ("inline", "process", "ray"):
        out = tmp_path / isolation
        make_trainer(reward=low, isolation=isolation, num_workers=2, max_steps=2, output_dir=out).train()
        rewards.append([(step["reward"], step["loss"], step["grad_norm"]) for step in steps_of(out)])
    assert rewards[0] == rewards[1] == rewards[2]


def test_a_process_that_dies_stops_the_run_with_its_message(make_trainer, tmp_path):
    def dies(completions, **kwargs):
        print("no licence for the verifier")
        os._exit(7)

    with pytest.raises(RewardError, match=r"'dies' failed on rows 0 to 3 .* died \(exit status 7\)(.|\n)*no licence"):
        make_trainer(reward=dies, **PROCESS, eval_before=False).train()
    assert (tmp_path / "run" / "adapter").is_dir()


def test_normalised_sums_train(make_trainer, tmp_path):
    def large(completion_ids, **kwargs):
        return [1000.0 * sum(token < 130 for token in ids) for ids in completion_ids]

    def small(completion_ids, **kwargs):
        return [0.001 * len(set(ids)) for ids in completion_ids]

    make_trainer(
        reward=[large, small], multi_objective_aggregation="normalize_then_sum", max_steps=1, completions_steps=1
    ).train()
    (path,) = (tmp_path / "run" / "completions").iterdir()
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert max(abs(row["advantage"]) for row in rows) < 4
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-6)
