"""Runs in which reward functions give no rewards for a while: no reward is not reward 0."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tiny_runs import metrics_of, steps_of
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback

from rankup.grpo.common.errors import TrainingStoppedError
from rankup.grpo.run.records import read_summary

OUTAGE = range(12, 18)
LONG = {"max_steps": 22, "eval_before": False, "learning_rate": 1e-3, "prompts_per_step": 2}


def high(completion_ids, trainer_state, **kwargs):
    """Always near 1, so that a 0 would be a steep fall; with some variance."""
    return [1.0 + 0.01 * sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def judge(completion_ids, trainer_state, **kwargs):
    rewards = high(completion_ids, trainer_state)
    return [None] * len(rewards) if trainer_state.global_step in OUTAGE else rewards


def fails(completion_ids, trainer_state, **kwargs):
    if trainer_state.global_step in OUTAGE:
        raise ConnectionError("the judge does not answer")
    return high(completion_ids, trainer_state)


def low_ids(completion_ids, **kwargs):
    return [0.01 * sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (judge, {}),
        (judge, {"beta": 0.1}),  # a penalty must not move the policy alone
        (fails, {"on_error": "none"}),
        (fails, {"on_error": 0.0}),
        ([judge, low_ids], {}),
        ([fails, low_ids], {"on_error": "none"}),
        ([fails, low_ids], {"on_error": -1.0}),
    ],
    ids=["none", "none with a penalty", "failure", "failure as 0", "none of two", "failure of two", "failure of two as -1"],
)
def test_an_outage_is_no_evidence_for_guards(make_trainer, tmp_path, capsys, reward: Any, options: dict[str, Any]):
    make_trainer(reward=reward, **LONG, **options).train()
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 22
    assert steps[-1]["guards/alarms"] == steps[-1]["guards/restores"] == steps[-1]["guards/halvings"] == 0
    name = "judge" if "judge" in str(reward) else "fails"
    if reward is judge or (reward is fails and options == {"on_error": "none"}):
        for step in OUTAGE:
            row = steps[step]
            assert row["reward"] is row["reward_std"] is row["frac_reward_zero_std"] is row[f"rewards/{name}/mean"] is None
            assert row[f"rewards/{name}/none_ratio"] == 1.0 and "updates" not in row
    out = capsys.readouterr().out
    assert f"step 13: no completion has a reward (functions: {name})" in out or name in out.split("step 13:")[1].splitlines()[0]


def test_an_outage_that_lasts_stops_the_run_with_a_checkpoint_from_which_it_resumes(make_trainer, tmp_path):
    answers = []

    def dead(completion_ids, trainer_state, **kwargs):
        return high(completion_ids, trainer_state) if answers or trainer_state.global_step < 2 else [None] * len(completion_ids)

    changes = {"max_steps": 8, "max_steps_without_reward": 3, "eval_before": False}
    with pytest.raises(TrainingStoppedError, match=r"3 steps in a row in which no completion had a reward \(functions: dead\)"):
        make_trainer(reward=dead, **changes).train()
    assert len(steps_of(tmp_path / "run")) == 5
    assert (tmp_path / "run" / "learning_curve.png").is_file()
    answers.append(True)
    make_trainer(reward=dead, **{**changes, "max_steps_without_reward": 4}).train(resume_from_checkpoint=True)
    assert [row["reward"] is None for row in steps_of(tmp_path / "run")] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_run_without_any_reward_ends_normally_where_the_user_wants_it(make_trainer, tmp_path):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    make_trainer(reward=nothing, max_steps=3, max_steps_without_reward=None).train()
    summary = read_summary(tmp_path / "run")
    assert summary is not None and summary["evaluation"]["after"]["reward"] is None
    assert [row["eval_reward"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row] == [None, None]
    assert not (tmp_path / "run" / "learning_curve.png").exists()


def test_early_stopping_takes_no_reward_for_no_decline(make_trainer, tmp_path):
    seen: list[Any] = []

    class Sees(TrainerCallback):
        def on_evaluate(self, args, state, control, *, metrics, **kwargs):
            seen.append(metrics["eval_reward"])

    def dead_between(completion_ids, trainer_state, **kwargs):
        dead = trainer_state.global_step in (2, 3, 4)
        return [None if dead else float(trainer_state.global_step)] * len(completion_ids)

    class Stopping(EarlyStoppingCallback):
        """transformers' callback asks for options that only transformers' arguments have."""

        def on_train_begin(self, args, state, control, **kwargs):
            pass

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            class Arguments:
                metric_for_best_model, greater_is_better = "eval_reward", True

            super().on_evaluate(Arguments, state, control, metrics, **kwargs)  # pyright: ignore

    trainer = make_trainer(reward=dead_between, max_steps=6, eval_steps=1, callbacks=[Sees(), Stopping(2)])
    trainer.train()
    assert len(steps_of(tmp_path / "run")) == 6
    assert [value is None for value in seen] == [False, False, True, True, True, False, False]
    assert trainer.state.best_metric == 6.0


def test_trainer_state_has_the_attributes_of_trl(make_trainer, tmp_path):
    seen: list[Any] = []

    def sees(completion_ids, trainer_state, **kwargs):
        seen.append(trainer_state)
        trainer_state.log_history.append("spoiled")
        return high(completion_ids, trainer_state)

    trainer = make_trainer(reward=sees, max_steps=3, eval_before=False, prompts_per_step=3)
    trainer.train()
    of_steps = [state for state in seen if state.global_step < 3][::3][:3]
    assert [(state.global_step, state.max_steps, state.epoch) for state in of_steps] == [(0, 3, 0.0), (1, 3, 0.25), (2, 3, 0.5)]
    for state in of_steps:
        rows = state.log_history[:-1]
        assert [row["step"] for row in rows] == list(range(1, state.global_step + 1))
        assert all(math.isfinite(row["reward"]) and row["epoch"] > 0 for row in rows)
        assert state.is_world_process_zero and state.num_train_epochs == 1
    assert all("spoiled" not in str(row) for row in trainer.state.log_history)


def test_trainer_state_is_the_same_in_a_process(make_trainer, tmp_path):
    def knows(completion_ids, trainer_state, log_extra, **kwargs):
        log_extra("state", [json.dumps([trainer_state.epoch, len(trainer_state.log_history)])] * len(completion_ids))
        return [float(len(set(ids))) for ids in completion_ids]

    import pyarrow.parquet

    make_trainer(reward=knows, max_steps=2, eval_before=False, isolation="process", num_workers=1, completions_steps=1).train()
    tables = [pyarrow.parquet.read_table(path) for path in sorted((tmp_path / "run" / "completions").iterdir())]
    assert [set(table["state"].to_pylist()) for table in tables] == [{"[0.0, 0]"}, {"[0.25, 1]"}]


def test_names_of_the_run_cannot_be_overwritten_and_are_all_known(make_trainer, tmp_path):
    from rankup.rewards.logged import logged_name

    def logs(completion_ids, log_metric, log_extra, **kwargs):
        for name in ("reward", "step", "eval_reward", "loss", "time/rollout", "mine", "guards/alarms", "num_tokens"):
            log_metric(name, -99.0)
        for name in ("prompt", "reward", "completion", "logs", "target", "logs/error"):
            log_extra(name, ["x"] * len(completion_ids))
        return high(completion_ids, None)

    make_trainer(
        reward=logs, max_steps=2, eval_steps=1, completions_steps=1, beta=0.01, mask_truncated_completions=True
    ).train()
    rows = metrics_of(tmp_path / "run")
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2] and all(row["reward"] > 0 for row in steps)
    assert all(row["mine"] == row["rewards/logs/reward"] == row["rewards/logs/eval_reward"] == -99.0 for row in steps)
    assert not [row for row in steps if "eval_reward" in row]
    own = {name for row in rows for name in row if not name.startswith("rewards/") and name != "mine"}
    assert {name for name in own if logged_name("f", name) == name} == set(), "add these names to rewards/logged.py"

    from rankup.grpo.run.completions import read_completions

    path, *_ = sorted((tmp_path / "run" / "completions").iterdir())
    for row in read_completions(path):
        assert row["prompt"].startswith("count to") and row["reward"] > 0 and isinstance(row["data"]["target"], int)
        assert row["extras/prompt"] == row["extras/reward"] == "x" and row["rewards"]["logs"] > 0


def test_what_a_function_logs_never_ends_a_step_after_its_update(make_trainer, tmp_path):
    import numpy as np
    import torch

    def logs(completion_ids, log_extra, **kwargs):
        count = len(completion_ids)
        log_extra("array", np.zeros((count, 2)))
        log_extra("tensor", torch.ones(count, 2, requires_grad=True))
        log_extra("scalars", list(np.arange(count)))
        log_extra("huge", [10**400] * count)
        log_extra("mixed", [1, "a", None, [2]][:count])
        log_extra("half", ["\ud800"] * count)
        log_extra("objects", [object] * count)
        return high(completion_ids, None)

    make_trainer(reward=logs, max_steps=1, eval_before=False, completions_steps=1).train()
    assert len(steps_of(tmp_path / "run")) == 1


def test_a_function_that_exits_ends_the_run_with_an_error(make_trainer, tmp_path):
    from rankup.rewards.contract import RewardError

    def runs_code(completion_ids, trainer_state, **kwargs):
        exec("import sys; sys.exit(0)" if trainer_state.global_step else "")
        return high(completion_ids, trainer_state)

    with pytest.raises(RewardError, match=r"'runs_code' failed on .*sys\.exit"):
        make_trainer(reward=runs_code, max_steps=2, eval_before=False).train()
    assert len(steps_of(tmp_path / "run")) == 1
