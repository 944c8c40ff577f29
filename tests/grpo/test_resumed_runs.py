"""A run that was interrupted and resumed is bit-exactly the run without an interruption."""

import functools
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import FaultError, failing_at, left_behind, low_ids_with_noise
from safetensors.torch import load_file
from tiny_runs import ROWS, metrics_of

from rankup.grpo.common.interrupts import RunInterrupted

Expected = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What runs without an interruption leave behind, by their options."""
    return {}


@pytest.fixture
def undisturbed(train, tmp_path: Path, results: dict[str, dict[str, Any]]) -> Expected:
    """What a run of these options leaves behind if nothing interrupts it. It is made once for all tests of this file."""

    def left_by(**changes: Any) -> dict[str, Any]:
        key = repr(sorted(changes.items()))
        if key not in results:
            train("undisturbed", **changes)
            results[key] = left_behind(tmp_path / "undisturbed")
        return results[key]

    return left_by


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two updates a step, two learning rates": {"num_iterations": 2, "lora_plus_ratio": 4.0, "lr_scheduler_type": "cosine"},
    "guards that act": {
        "learning_rate": 0.05, "max_steps": 10, "baseline_steps": 2, "entropy_watch": 0.95, "entropy_stop": 0.9,
    },
    "further prompts": {"max_resampling_rounds": 2, "shuffle": False},
    "a loss scale that gives way": {"dtype": "float16", "initial_loss_scale": 2.0**24, "num_iterations": 2},
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("failing_step", [3, 5])
def test_a_resumed_run_equals_the_undisturbed_one(
    train, undisturbed: Expected, tmp_path: Path, changes: dict, failing_step: int
):
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(failing_step, FaultError()), **changes)
    summary = json.loads((tmp_path / "failed" / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == failing_step
    train("failed", resume=True, **changes)
    one, other = undisturbed(**changes), left_behind(tmp_path / "failed")
    assert one["metrics"] == other["metrics"]
    assert one == other
    if "entropy_stop" in changes:
        assert one["summary"]["guards"]["guards/restores"] > 0
    if "initial_loss_scale" in changes:
        assert metrics_of(tmp_path / "failed")[1]["loss_scale/overflows"] > 0


def test_a_checkpoint_without_a_loss_scale_resumes_with_the_initial_one(train, tmp_path: Path):
    """Those of other data types and of earlier versions have none."""
    with pytest.raises(RuntimeError, match="FaultError"):
        train("run", reward=failing_at(3, FaultError()))
    train("run", resume=True, dtype="float16", initial_loss_scale=2.0**10, allow_changes=True)
    scales = [row.get("loss_scale") for row in metrics_of(tmp_path / "run") if "reward" in row]
    assert scales == [None] * 3 + [2.0**10] * 3


@pytest.mark.engine
def test_a_run_with_vllm_resumes_bit_exactly(train, vllm_engine, tmp_path: Path):
    train("undisturbed", vllm=vllm_engine)
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(3, FaultError()), vllm=vllm_engine)
    train("failed", vllm=vllm_engine, resume=True)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


def test_the_checkpoint_holds_the_last_complete_step(train, tmp_path: Path):
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


def test_a_failure_in_an_evaluation_loses_nothing(train, undisturbed: Expected, tmp_path: Path):
    calls = 0

    def fails_in_the_evaluation_after_two_steps(completion_ids, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4 + 2 * 3 + 2:  # the first evaluation, two steps, one prompt of the second evaluation
            raise FaultError
        return low_ids_with_noise(completion_ids)

    functools.update_wrapper(fails_in_the_evaluation_after_two_steps, low_ids_with_noise)  # the same code to a run that resumes
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=fails_in_the_evaluation_after_two_steps)
    assert [row["step"] for row in metrics_of(tmp_path / "failed") if "eval_reward" in row] == [0]
    train("failed", resume=True)
    assert undisturbed() == left_behind(tmp_path / "failed")


LOSS = """
calls = 0

def loss(inputs):
    global calls
    calls += 1
    if calls == FAILS_AT:
        raise RuntimeError("the device is gone")
    return -inputs.advantages * inputs.logprobs
"""


def test_a_failure_in_the_backward_pass_loses_nothing(train, tmp_path: Path):
    """Most failures of a device come there, before the update has changed anything."""
    works, fails = tmp_path / "works.py", tmp_path / "fails.py"
    works.write_text(LOSS.replace("FAILS_AT", "-1"))
    fails.write_text(LOSS.replace("FAILS_AT", "4"))
    train("undisturbed", loss_type=f"{works}:loss")
    with pytest.raises(RuntimeError, match="the device is gone"):
        train("failed", loss_type=f"{fails}:loss")
    assert (tmp_path / "failed" / "checkpoints" / "step_000003").is_dir()
    train("failed", resume=True, loss_type=f"{works}:loss", allow_changes=True)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


def test_a_run_resumes_from_a_named_checkpoint_and_sets_later_ones_aside(train, tmp_path: Path, capsys):
    train("undisturbed", save_steps=2)
    undisturbed = left_behind(tmp_path / "undisturbed")
    checkpoints = tmp_path / "undisturbed" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000004", "step_000006"]
    train("undisturbed", save_steps=2, resume=checkpoints / "step_000004")
    assert left_behind(tmp_path / "undisturbed") == undisturbed
    assert "step_000006.aside.1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not a checkpoint of this run"):
        train("other", resume=checkpoints / "step_000004")


def test_a_finished_run_is_left_as_it_is(train, tmp_path: Path, capsys):
    first = train("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train("run", resume=True) == first
    assert "already finished: there is nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_finished_run_can_be_made_longer(train, tmp_path: Path):
    train("long", max_steps=6, eval_steps=0)
    train("short", max_steps=4, eval_steps=0)
    train("short", max_steps=6, eval_steps=0, resume=True)
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


def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_previous_one(
    train, undisturbed: Expected, tmp_path: Path, capsys
):
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(5, FaultError()), save_steps=2)
    newest = tmp_path / "failed" / "checkpoints" / "step_000005"
    (newest / "optimizer.safetensors").write_bytes(b"")
    train("failed", resume=True, save_steps=2)
    out = capsys.readouterr().out
    assert f"skipped {newest}: optimizer.safetensors has 0 bytes" in out and "resuming after step 4" in out
    assert undisturbed(save_steps=2) == left_behind(tmp_path / "failed")


def test_other_data_and_other_rewards_are_refused(make_trainer, tmp_path: Path):
    with pytest.raises(RuntimeError, match="FaultError"):
        make_trainer(save_steps=1, reward=failing_at(1, FaultError())).train()
    reward = low_ids_with_noise
    changed = make_trainer(save_steps=1, reward=reward, rows=[*ROWS[:-1], {"prompt": "count to 12", "target": 11}])
    with pytest.raises(ValueError, match=r"training data\.hash: \w+ in the checkpoint, \w+ now") as caught:
        changed.train(resume_from_checkpoint=True)
    assert "--allow-changes" in str(caught.value)
    other = make_trainer(save_steps=1)
    with pytest.raises(ValueError, match=r"\['low_ids_with_noise'\] in the checkpoint, \['many_low_ids'\] now"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("place", "step"), [("a step", 3), ("an evaluation", 2)])
def test_a_signal_ends_the_run_where_it_can_resume(train, undisturbed: Expected, tmp_path: Path, place: str, step: int):
    """After the step; an evaluation is interrupted immediately, and repeated."""

    def requests_a_stop(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        is_at_place = trainer_state.global_step == 2 and (len(completion_ids) > 1) == (place == "a step")
        if is_at_place and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return low_ids_with_noise(completion_ids)

    asked: list[bool] = []
    functools.update_wrapper(requests_a_stop, low_ids_with_noise)  # the same code to a run that resumes
    with pytest.raises(RunInterrupted) as caught:
        train("stopped", reward=requests_a_stop)
    assert caught.value.code == 0 and caught.value.signal == "SIGTERM"
    assert caught.value.checkpoint == tmp_path / "stopped" / "checkpoints" / f"step_{step:06d}"
    train("stopped", resume=True)
    assert undisturbed() == left_behind(tmp_path / "stopped")


WIDE = {"rank": 64, "alpha": 128}
"""Ranks below have too few parameters in a matrix for state of 8 bits."""


def test_a_run_with_8_bit_state_resumes_bit_exactly(train, tmp_path: Path):
    changes: dict[str, Any] = {**WIDE, "optimizer": "adamw_8bit", "lora_plus_ratio": 2.0}
    train("undisturbed", **changes)
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(5, FaultError()), **changes)
    state = load_file(tmp_path / "failed" / "checkpoints" / "step_000005" / "optimizer.safetensors")
    assert all(tensor.dtype == torch.uint8 for name, tensor in state.items() if name.endswith((".state1", ".state2")))
    assert {int(tensor) for name, tensor in state.items() if name.endswith(".step")} == {5}
    train("failed", resume=True, **changes)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


@pytest.mark.parametrize("names", [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_another_optimizer_is_refused_or_starts_from_scratch(train, capsys, names: tuple[str, str]):
    with pytest.raises(RuntimeError, match="FaultError"):
        train("run", **WIDE, reward=failing_at(4, FaultError()), optimizer=names[0])
    with pytest.raises(ValueError, match=f"optim.optimizer: {names[0]} in the checkpoint, {names[1]} now"):
        train("run", **WIDE, resume=True, optimizer=names[1])
    summary = train("run", **WIDE, resume=True, allow_changes=True, optimizer=names[1])
    assert summary["steps"] == 6
    assert f"optim.optimizer={names[1]} starts from scratch" in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_is_reported_and_costs_only_that_checkpoint(train, small_disk, tmp_path: Path, capsys):
    """The run continues while only checkpoints do not fit; earlier checkpoints stay complete."""
    changes: dict[str, Any] = {"save_steps": 1, "keep_last": 20, "keep_best": 0, "max_steps": 10, "completions_steps": 0}
    train("undisturbed", **changes)
    disk = small_disk("4m")  # room for a few checkpoints
    try:
        train("disk/run", **changes)
    except OSError:
        pass  # a line of metrics or the adapter did not fit either
    out = capsys.readouterr().out
    assert "could not be written" in out and "No space left on device" in out
    saved = sorted((disk / "run" / "checkpoints").glob("step_*"))
    assert saved and len(saved) < 10
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    train("disk/run", resume=True, **changes)
    assert left_behind(disk / "run") == left_behind(tmp_path / "undisturbed")


SCORE = """
from shares import share

def score(completion_ids, trainer_state, **kwargs):
    if trainer_state.global_step == 1 and {fails}:
        raise OSError("the disk is gone")
    return [share(ids) for ids in completion_ids]
"""


def test_an_edited_reward_file_or_neighbour_is_refused_until_changes_are_allowed(train, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(SCORE.format(fails=True))
    (tmp_path / "shares.py").write_text("def share(ids):\n    return sum(token < 130 for token in ids) / len(ids)\n")
    options = {"reward": "score.py:score", "save_steps": 1, "max_steps": 2}
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train("edited", **options)
    (tmp_path / "score.py").write_text(SCORE.format(fails=False))
    with pytest.raises(ValueError, match=r"code of functions\.score\.py: \w+ in the checkpoint, \w+ now") as caught:
        train("edited", resume=True, **options)
    assert "--allow-changes" in str(caught.value) and "shares.py" not in str(caught.value)
    (tmp_path / "score.py").write_text(SCORE.format(fails=True))
    (tmp_path / "shares.py").write_text("def share(ids):\n    return 1 - sum(token < 130 for token in ids) / len(ids)\n")
    with pytest.raises(ValueError, match=r"code of functions\.shares\.py: \w+ in the checkpoint, \w+ now"):
        train("edited", resume=True, **options)
    (tmp_path / "score.py").write_text(SCORE.format(fails=False))
    capsys.readouterr()
    assert train("edited", resume=True, allow_changes=True, **options)["steps"] == 2
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: code of functions.shares.py" in printed and "resuming after step 1" in printed
    assert train("edited", resume=True, **options)["steps"] == 2  # finished: the code that it ended with is the run's


def test_prompts_with_todays_date_are_other_data_on_another_day_unless_the_date_is_given(make_trainer, tmp_path: Path):
    written = "{{ date_string if date_string is defined else strftime_now('%f') }}"  # microseconds: a day passes at once
    template = "{% for message in messages %}{{ message.content }}{% endfor %} " + written
    rows = [{"prompt": [{"role": "user", "content": f"count to {n}"}]} for n in range(3)]

    def train_to(step: int, *, resume: bool, **changes: Any) -> int:
        reward = low_ids_with_noise
        trainer = make_trainer(reward, rows, chat_template=template, save_steps=1, max_steps=step, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.summary["steps"]

    train_to(1, resume=False)
    with pytest.raises(ValueError, match=r"training data\.hash: \w+ in the checkpoint, \w+ now"):
        train_to(2, resume=True)
    fixed: dict[str, Any] = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}, "output_dir": tmp_path / "fixed"}
    train_to(1, resume=False, **fixed)
    assert train_to(2, resume=True, **fixed) == 2
