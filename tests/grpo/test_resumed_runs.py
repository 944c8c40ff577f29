"""A run that was interrupted and taken up again is, to the bit, the run that was not: real vLLM on a tiny model."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from tiny_runs import ROWS, metrics_of, timeless

from rankup.grpo.interrupts import RunInterrupted
from rankup.grpo.silent import SilentView

pytestmark = pytest.mark.engine

OPTIONS: dict[str, Any] = {"max_steps": 6, "eval_steps": 2, "save_steps": 4, "completions_steps": 2}


class FaultError(Exception):
    """What a reward function raises in these tests."""


def low_ids_with_luck(completion_ids: list, **kwargs: Any) -> list[float]:
    """A reward that also draws from Python's global generator."""
    return [sum(token < 130 for token in ids) / len(ids) + 0.01 * random.random() for ids in completion_ids]


def failing_at(step: int, error: BaseException) -> Callable[..., list[float]]:
    """The same reward under the same name, that raises in a step (from 0)."""

    def low_ids_with_luck_until(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == step:
            raise error
        return low_ids_with_luck(completion_ids)

    low_ids_with_luck_until.__name__ = low_ids_with_luck.__name__
    return low_ids_with_luck_until


def left_behind(run: Path) -> dict[str, Any]:
    """Everything that must be the same: adapter, metrics, completions, and the summary's evaluation and guards."""
    summary = json.loads((run / "summary.json").read_text())
    tables = {path.name: pyarrow.parquet.read_table(path).to_pylist() for path in sorted((run / "completions").iterdir())}
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": timeless(run),
        "completions": tables,
        "summary": {name: summary[name] for name in ("steps", "evaluation", "guards", "interrupted")},
    }


@pytest.fixture
def train(make_trainer, run_engine, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a run in a folder of that name, from the same seed of Python's generator unless it is resumed."""

    def run(name: str, *, reward=low_ids_with_luck, resume: Any = False, allow_changes: bool = False, **changes: Any):
        random.seed(99 if resume else 7)
        options = OPTIONS | changes
        trainer = make_trainer(reward=reward, output_dir=tmp_path / name, **options)
        return trainer.train(engine=run_engine, resume_from_checkpoint=resume, allow_changes=allow_changes)

    return run


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "two updates a step, two learning rates": {"num_iterations": 2, "lora_plus_ratio": 4.0, "lr_scheduler_type": "cosine"},
    "guards that act": {
        "learning_rate": 0.05, "max_steps": 10, "baseline_steps": 2, "entropy_watch": 0.95, "entropy_stop": 0.9,
    },
    "further prompts": {"max_resampling_rounds": 2, "shuffle": False},
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("failing_step", [3, 5])
def test_a_run_that_failed_and_goes_on_is_the_undisturbed_one(train, tmp_path: Path, changes: dict, failing_step: int):
    train("undisturbed", **changes)
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(failing_step, FaultError()), **changes)
    summary = json.loads((tmp_path / "failed" / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == failing_step
    train("failed", resume=True, **changes)
    one, other = left_behind(tmp_path / "undisturbed"), left_behind(tmp_path / "failed")
    assert one["metrics"] == other["metrics"]
    assert one == other
    if "entropy_stop" in changes:
        assert one["summary"]["guards"]["guards/restores"] > 0


def test_the_checkpoint_holds_the_last_whole_step(train, tmp_path: Path):
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(5, FaultError()))
    assert sorted(path.name for path in (tmp_path / "failed" / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    folder = tmp_path / "failed" / "checkpoints" / "step_000005"
    assert {path.name for path in folder.iterdir()} == {
        "adapter", "config.yaml", "manifest.json", "optimizer.safetensors", "snapshot_evaluation.safetensors",
        "snapshot_step.safetensors", "state.json",
    }  # fmt: skip
    adapter, saved = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, tmp_path / "failed")
    )
    assert all(adapter[name].equal(saved[name]) for name in saved)


def test_a_failure_in_an_evaluation_loses_nothing(train, tmp_path: Path):
    calls = 0

    def fails_in_the_evaluation_after_two_steps(completion_ids, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4 + 2 * 3 + 2:  # the first evaluation, two steps, one prompt of the second evaluation
            raise FaultError
        return low_ids_with_luck(completion_ids)

    fails_in_the_evaluation_after_two_steps.__name__ = low_ids_with_luck.__name__
    train("undisturbed")
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=fails_in_the_evaluation_after_two_steps)
    assert [row["step"] for row in metrics_of(tmp_path / "failed") if "eval_reward" in row] == [0]
    train("failed", resume=True)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


LOSS = """
calls = 0

def loss(inputs):
    global calls
    calls += 1
    if calls == FAILS_AT:
        raise MemoryError("no room for the backward pass")
    return -inputs.advantages * inputs.logprobs
"""


def test_a_failure_in_the_backward_pass_loses_nothing(train, tmp_path: Path):
    """Out of memory comes there, before the update has changed anything."""
    whole, fails = tmp_path / "whole.py", tmp_path / "fails.py"
    whole.write_text(LOSS.replace("FAILS_AT", "-1"))
    fails.write_text(LOSS.replace("FAILS_AT", "4"))
    train("undisturbed", loss_type=f"{whole}:loss")
    with pytest.raises(MemoryError):
        train("failed", loss_type=f"{fails}:loss")
    assert (tmp_path / "failed" / "checkpoints" / "step_000003").is_dir()
    train("failed", resume=True, loss_type=f"{whole}:loss", allow_changes=True)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


def test_a_run_goes_on_from_a_named_checkpoint_and_sets_later_ones_aside(train, tmp_path: Path, capsys):
    train("undisturbed", save_steps=2)
    whole = left_behind(tmp_path / "undisturbed")
    checkpoints = tmp_path / "undisturbed" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000004", "step_000006"]
    train("undisturbed", save_steps=2, resume=checkpoints / "step_000004")
    assert left_behind(tmp_path / "undisturbed") == whole
    assert "step_000006.aside.1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no checkpoint of this run"):
        train("other", resume=checkpoints / "step_000004")


def test_a_finished_run_is_left_as_it_is(train, tmp_path: Path, capsys):
    first = train("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train("run", resume=True) == first
    assert "nothing left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_finished_run_can_be_made_longer(train, tmp_path: Path):
    train("long", max_steps=6, eval_steps=0)
    train("short", max_steps=4, eval_steps=0)
    with pytest.raises(ValueError, match=r"optim.max_steps: 4 there, 6 here"):
        train("short", max_steps=6, eval_steps=0, resume=True)
    train("short", max_steps=6, eval_steps=0, resume=True, allow_changes=True)
    assert left_behind(tmp_path / "short")["adapter"] == left_behind(tmp_path / "long")["adapter"]
    steps = [row["step"] for row in metrics_of(tmp_path / "short") if "reward" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_without_a_checkpoint_the_run_starts_at_its_first_step(train, tmp_path: Path, capsys):
    with pytest.raises(RuntimeError, match="FaultError"):
        train("run", reward=failing_at(0, FaultError()))
    assert not (tmp_path / "run" / "checkpoints").exists()
    summary = train("run", resume=True)
    assert summary["steps"] == 6
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(train, tmp_path: Path, capsys):
    train("undisturbed", save_steps=2)
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(5, FaultError()), save_steps=2)
    newest = tmp_path / "failed" / "checkpoints" / "step_000005"
    (newest / "optimizer.safetensors").write_bytes(b"")
    train("failed", resume=True, save_steps=2)
    out = capsys.readouterr().out
    assert f"skipped {newest}: optimizer.safetensors has 0 bytes" in out and "going on after step 4" in out
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


def test_other_data_and_other_rewards_are_refused(make_trainer, run_engine, tmp_path: Path):
    with pytest.raises(RuntimeError, match="FaultError"):
        make_trainer(save_steps=1, reward=failing_at(1, FaultError())).train(engine=run_engine)
    reward = low_ids_with_luck
    changed = make_trainer(save_steps=1, reward=reward, rows=[*ROWS[:-1], {"prompt": "count to 12", "target": 11}])
    with pytest.raises(ValueError, match=r"training data\.hash: \w+ there, \w+ here") as caught:
        changed.train(engine=run_engine, resume_from_checkpoint=True)
    assert "--allow-changes" in str(caught.value)
    other = make_trainer(save_steps=1)
    with pytest.raises(ValueError, match=r"reward functions: \['low_ids_with_luck'\] there, \['many_low_ids'\] here"):
        other.train(engine=run_engine, resume_from_checkpoint=True)


@pytest.mark.parametrize(("place", "step"), [("a step", 3), ("an evaluation", 2)])
def test_a_signal_ends_the_run_where_it_can_go_on(train, tmp_path: Path, place: str, step: int):
    """After the step; an evaluation is left at once, and made again."""

    def asks_to_stop(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        is_there = trainer_state.global_step == 2 and (len(completion_ids) > 1) == (place == "a step")
        if is_there and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return low_ids_with_luck(completion_ids)

    asked: list[bool] = []
    asks_to_stop.__name__ = low_ids_with_luck.__name__
    train("undisturbed")
    with pytest.raises(RunInterrupted) as caught:
        train("stopped", reward=asks_to_stop)
    assert caught.value.code == 0 and caught.value.signal == "SIGTERM"
    assert caught.value.checkpoint == tmp_path / "stopped" / "checkpoints" / f"step_{step:06d}"
    train("stopped", resume=True)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "stopped")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: room for one checkpoint and a part of the next."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_costs_no_more_than_that_checkpoint(train, small_disk: Path, tmp_path: Path, capsys):
    """The run goes on while only checkpoints do not fit; what was saved before stays whole."""
    changes: dict[str, Any] = {"save_steps": 1, "keep_last": 20, "keep_best": 0, "max_steps": 20, "completions_steps": 0}
    train("undisturbed", **changes)
    try:
        train("disk/run", **changes)
    except OSError:
        pass  # a line of metrics or the adapter did not fit either
    out = capsys.readouterr().out
    assert "could not be written" in out and "No space left on device" in out
    saved = sorted((small_disk / "run" / "checkpoints").glob("step_*"))
    assert saved and len(saved) < 20
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train("disk/run", resume=True, **changes)
    assert left_behind(small_disk / "run") == left_behind(tmp_path / "undisturbed")


# -------------------------------------------------------------------------------- what a resumption must not trust or spoil


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_summary_of_an_earlier_course_does_not_end_a_run(train, tmp_path: Path):
    """A finished run is made longer and killed in its last evaluation: the checkpoint of the last step is there already."""

    def is_killed_in_the_last_evaluation(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 6 and not (tmp_path / "killed").exists():
            shutil.copytree(tmp_path / "run", tmp_path / "killed")  # what a SIGKILL would leave in this moment
        return low_ids_with_luck(completion_ids)

    is_killed_in_the_last_evaluation.__name__ = low_ids_with_luck.__name__
    longer = {"max_steps": 6, "eval_steps": 0, "save_steps": 3}
    train("run", max_steps=4, eval_steps=0)
    train("run", reward=is_killed_in_the_last_evaluation, resume=True, allow_changes=True, **longer)
    assert (tmp_path / "killed" / "checkpoints" / "step_000006").is_dir()
    summary = train("killed", resume=True, **longer)
    assert summary["steps"] == 6
    assert left_behind(tmp_path / "killed")["adapter"] == left_behind(tmp_path / "run")["adapter"]


def test_going_on_removes_the_summary_of_the_course_before(train, tmp_path: Path):
    train("run", max_steps=4, eval_steps=0)

    def looks(completion_ids: list, **kwargs: Any) -> list[float]:
        seen.append((tmp_path / "run" / "summary.json").exists())
        return low_ids_with_luck(completion_ids)

    seen: list[bool] = []
    looks.__name__ = low_ids_with_luck.__name__
    train("run", reward=looks, resume=True, allow_changes=True, max_steps=6, eval_steps=0)
    assert seen and not any(seen)


def test_fewer_steps_than_were_done_are_refused(train):
    train("run", max_steps=6)
    with pytest.raises(ValueError, match=r"has done 6 steps already, more than optim.max_steps=4"):
        train("run", max_steps=4, resume=True, allow_changes=True)


def test_a_resumption_that_fails_leaves_the_folder_as_it_was(train, tmp_path: Path):
    train("run", save_steps=2)
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match="lora_alpha"):
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
        return [0.1] if is_evaluation else low_ids_with_luck(completion_ids)

    kept = {}
    best_after_two_steps.__name__ = low_ids_with_luck.__name__
    for name in ("undisturbed", "stopped"):
        asked: list[bool] = []
        if name == "stopped":
            with pytest.raises(RunInterrupted):
                train(name, reward=best_after_two_steps, **changes)
        train(name, reward=best_after_two_steps, resume=name == "stopped", **changes)
        kept[name] = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
    assert kept["undisturbed"] == kept["stopped"] == ["step_000002", "step_000008"]


def test_one_trainer_can_be_interrupted_and_go_on(make_trainer, run_engine, tmp_path: Path):
    def asks_to_stop_once(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 1 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return low_ids_with_luck(completion_ids)

    asked: list[bool] = []
    trainer = make_trainer(reward=asks_to_stop_once, max_steps=3)
    with pytest.raises(RunInterrupted):
        trainer.train(engine=run_engine)
    assert trainer.can_go_on
    assert trainer.train(engine=run_engine, resume_from_checkpoint=True)["steps"] == 3
    assert trainer.train(engine=run_engine, resume_from_checkpoint=None)["steps"] == 3  # TRL's scripts hand None through


def test_a_finished_run_without_checkpoints_is_finished_too(train, tmp_path: Path, capsys):
    first = train("run", save_steps=0)
    before = files_of(tmp_path / "run")
    assert train("run", save_steps=0, resume=True) == first
    assert files_of(tmp_path / "run") == before and not (tmp_path / "run.1").exists()


def test_what_cannot_be_saved_does_not_replace_the_error(make_trainer, run_engine, tmp_path: Path, capsys):
    def fails(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 2:
            (tmp_path / "run" / "adapter.partial").mkdir()
            (tmp_path / "run" / "checkpoints").write_text("in the way")
            (tmp_path / "run" / "adapter.partial").rename(tmp_path / "run" / "learning_curve.png")
            raise FaultError
        return low_ids_with_luck(completion_ids)

    with pytest.raises(RuntimeError, match="FaultError"):
        make_trainer(reward=fails, max_steps=4).train(engine=run_engine)
    out = capsys.readouterr().out
    assert "could not save a checkpoint" in out and "could not draw the learning curve" in out
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "summary.json").is_file()


def test_a_view_that_fails_costs_no_step(make_trainer, run_engine, tmp_path: Path):
    class DeadView(SilentView):
        def step(self, step: int, metrics: Any, seconds_by_phase: Any) -> None:
            if step == 2:
                raise BrokenPipeError(32, "Broken pipe")

    trainer = make_trainer(reward=low_ids_with_luck, max_steps=4, save_steps=0)
    trainer.view = DeadView()
    with pytest.raises(BrokenPipeError):
        trainer.train(engine=run_engine)
    assert trainer.can_go_on and (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()


def test_after_an_interruption_a_trainer_evaluates(make_trainer, engine_shelf, run_engine, tmp_path: Path):
    def asks_to_stop(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 1 and len(asked) == 0:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return low_ids_with_luck(completion_ids)

    asked: list[None] = []
    trainer = make_trainer(reward=asks_to_stop)
    with pytest.raises(RunInterrupted):
        trainer.train(engine=run_engine)
    assert not hasattr(trainer, "session"), "its memory is free for the next one"
    engine_shelf.close()
    assert 0 <= trainer.evaluate(adapter=tmp_path / "run" / "adapter") <= 1.01


def test_a_signal_at_the_very_end_ends_a_script_too(make_trainer, run_engine, tmp_path: Path):
    class Asks(SilentView):
        def evaluation(self, step: int, reward: float, when: Any) -> None:
            if when == "after":
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer()
    trainer.view = Asks()
    with pytest.raises(RunInterrupted) as caught:
        trainer.train(engine=run_engine)
    assert caught.value.code == 0
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"]


def test_a_finished_run_with_other_data_is_refused(make_trainer, run_engine):
    make_trainer(save_steps=1).train(engine=run_engine)
    changed = make_trainer(save_steps=1, rows=[*ROWS[:-1], {"prompt": "count to 12", "target": 11}])
    with pytest.raises(ValueError, match=r"training data\.hash: \w+ there, \w+ here"):
        changed.train(engine=run_engine, resume_from_checkpoint=True)
