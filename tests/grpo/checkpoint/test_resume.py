"""Edge cases of interrupted and resumed runs."""

import errno
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from resumed import FaultError, left_behind, low_ids_with_noise
from tiny_runs import ROWS

from rankup.grpo import loop
from rankup.grpo.cluster.events import EventView
from rankup.grpo.common.interrupts import RunInterrupted
from rankup.grpo.run.records import RunRecorder


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_outdated_summary_does_not_finish_a_run(train, tmp_path: Path):
    """A finished run is extended and killed in its last evaluation, when the checkpoint of the last step exists already."""

    def is_killed_in_the_last_evaluation(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 6 and not (tmp_path / "killed").exists():
            shutil.copytree(tmp_path / "run", tmp_path / "killed")  # as a SIGKILL would leave it now
        return low_ids_with_noise(completion_ids)

    functools.update_wrapper(is_killed_in_the_last_evaluation, low_ids_with_noise)  # the same code to a run that resumes
    longer = {"max_steps": 6, "eval_steps": 0, "save_steps": 3}
    train("run", max_steps=4, eval_steps=0)
    train("run", reward=is_killed_in_the_last_evaluation, resume=True, **longer)
    assert (tmp_path / "killed" / "checkpoints" / "step_000006").is_dir()
    summary = train("killed", resume=True, **longer)
    assert summary["steps"] == 6
    assert left_behind(tmp_path / "killed")["adapter"] == left_behind(tmp_path / "run")["adapter"]


def test_resuming_removes_the_outdated_summary(train, tmp_path: Path):
    train("run", max_steps=4, eval_steps=0)

    def looks(completion_ids: list, **kwargs: Any) -> list[float]:
        seen.append((tmp_path / "run" / "summary.json").exists())
        return low_ids_with_noise(completion_ids)

    seen: list[bool] = []
    functools.update_wrapper(looks, low_ids_with_noise)  # the same code to a run that resumes
    train("run", reward=looks, resume=True, max_steps=6, eval_steps=0)
    assert seen and not any(seen)


def test_max_steps_below_the_checkpoint_is_refused(train):
    train("run", max_steps=6)
    with pytest.raises(ValueError, match=r"has done 6 steps already, more than optim.max_steps=4"):
        train("run", max_steps=4, resume=True, allow_changes=True)


def test_a_failed_resumption_leaves_the_folder_unchanged(train, tmp_path: Path):
    train("run", save_steps=2)
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"lora\.alpha: 16.0 in the checkpoint, 64.0 now"):
        train("run", save_steps=2, resume=True, allow_changes=True, alpha=64, max_steps=8, report_to="tensorboard")
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(OSError):
        checkpoint = tmp_path / "run" / "checkpoints" / "step_000004"
        train("run", save_steps=2, resume=checkpoint, report_to="tensorboard")
    (tmp_path / "run" / "tensorboard").unlink()
    assert files_of(tmp_path / "run") == before


def test_the_best_checkpoint_is_kept_though_a_signal_came_in_its_evaluation(train, tmp_path: Path):
    changes: dict[str, Any] = {"max_steps": 8, "save_steps": 2, "eval_steps": 2, "keep_last": 1}

    def best_after_two_steps(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        is_evaluation = len(completion_ids) == 1
        if is_evaluation and trainer_state.global_step == 2:
            if asked.append(True) or (name == "stopped" and len(asked) == 2):
                os.kill(os.getpid(), signal.SIGTERM)
            return [1.0]
        return [0.1] if is_evaluation else low_ids_with_noise(completion_ids)

    kept = {}
    functools.update_wrapper(best_after_two_steps, low_ids_with_noise)  # the same code to a run that resumes
    for name in ("undisturbed", "stopped"):
        asked: list[bool] = []
        if name == "stopped":
            with pytest.raises(RunInterrupted):
                train(name, reward=best_after_two_steps, **changes)
        train(name, reward=best_after_two_steps, resume=name == "stopped", **changes)
        kept[name] = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
    assert kept["undisturbed"] == kept["stopped"] == ["step_000002", "step_000008"]


def test_one_trainer_can_be_interrupted_and_resume(make_trainer, tmp_path: Path):
    def requests_a_stop_once(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 1 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return low_ids_with_noise(completion_ids)

    asked: list[bool] = []
    trainer = make_trainer(reward=requests_a_stop_once, max_steps=3)
    with pytest.raises(RunInterrupted):
        trainer.train()
    assert trainer.can_resume
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert trainer.train(resume_from_checkpoint=None).global_step == 3  # TRL's scripts hand None through


def test_a_finished_run_without_checkpoints_is_finished_too(train, tmp_path: Path, capsys):
    first = train("run", save_steps=0)
    before = files_of(tmp_path / "run")
    assert train("run", save_steps=0, resume=True) == first
    assert files_of(tmp_path / "run") == before and not (tmp_path / "run.1").exists()


def test_a_failed_save_does_not_replace_the_original_error(make_trainer, tmp_path: Path, capsys):
    def fails(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 2:
            (tmp_path / "run" / "in the way").mkdir()
            (tmp_path / "run" / "checkpoints").write_text("in the way")
            (tmp_path / "run" / "in the way").rename(tmp_path / "run" / "learning_curve.png")
            raise FaultError
        return low_ids_with_noise(completion_ids)

    with pytest.raises(RuntimeError, match="FaultError"):
        make_trainer(reward=fails, max_steps=4).train()
    out = capsys.readouterr().out
    assert "could not save a checkpoint" in out and "could not draw the learning curve" in out
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "summary.json").is_file()


def test_records_that_cannot_be_synced_cost_only_that_checkpoint(train, tmp_path: Path, capsys, monkeypatch):
    sync, calls = RunRecorder.sync, iter([True])

    def fails_once(recorder: RunRecorder) -> None:
        if next(calls, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(recorder)

    monkeypatch.setattr(RunRecorder, "sync", fails_once)
    assert train("run", save_steps=2)["steps"] == 6
    assert "could not be synced to the disk" in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


def test_an_interruption_that_could_not_be_saved_does_not_end_with_status_0(make_trainer, monkeypatch):
    """The state was left for that of the best snapshot, and the checkpoint before it had failed."""

    def leaves_its_position(ctx: Any, recorded: Any) -> None:
        ctx.checkpoints.leave_position()
        raise RunInterrupted(signal.SIGTERM)

    monkeypatch.setattr(loop, "end_with_best_policy", leaves_its_position)
    for save_steps, code in ((0, 128 + signal.SIGTERM), (1, 0)):
        with pytest.raises(RunInterrupted) as caught:
            make_trainer(save_steps=save_steps).train()
        assert caught.value.code == code


def test_a_failing_view_loses_no_step(make_trainer, tmp_path: Path):
    class DeadView(EventView):
        def step(self, step: int, metrics: Any, seconds_by_phase: Any) -> None:
            if step == 2:
                raise BrokenPipeError(32, "Broken pipe")

    trainer = make_trainer(reward=low_ids_with_noise, max_steps=4, save_steps=0)
    trainer.view = DeadView(lambda event: None)
    with pytest.raises(BrokenPipeError):
        trainer.train()
    assert trainer.can_resume and (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()


def test_a_trainer_evaluates_after_an_interruption(make_trainer, tmp_path: Path):
    def requests_a_stop(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 1 and len(asked) == 0:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return low_ids_with_noise(completion_ids)

    asked: list[None] = []
    trainer = make_trainer(reward=requests_a_stop)
    with pytest.raises(RunInterrupted):
        trainer.train()
    assert 0 <= trainer.evaluate(adapter=tmp_path / "run" / "adapter")["eval_reward"] <= 1.01


def test_a_complete_run_returns_although_a_signal_came_too_late(make_trainer, tmp_path: Path):
    class Asks(EventView):
        def evaluation(self, step: int, metrics: Any, when: Any) -> None:
            if when == "after":
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer()
    trainer.view = Asks(lambda event: None)
    trainer.train()
    summary = trainer.summary
    assert summary["interrupted"] and summary["steps"] == 2, "no SystemExit: exit codes belong to the command"
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"], "the run itself is complete"


def test_a_finished_run_with_other_data_is_refused(make_trainer):
    make_trainer(save_steps=1).train()
    changed = make_trainer(save_steps=1, rows=[*ROWS[:-1], {"prompt": "count to 12", "target": 11}])
    with pytest.raises(ValueError, match=r"training data\.hash: \w+ in the checkpoint, \w+ now"):
        changed.train(resume_from_checkpoint=True)


def test_a_run_folder_of_another_version_is_moved_aside(train, tmp_path: Path):
    """A summary with other fields must not disturb a new run, nor make it look finished."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "summary.json").write_text('{"interrupted": false, "steps": 6}')
    assert train("run")["steps"] == 6
    assert (tmp_path / "run.1" / "summary.json").is_file()
