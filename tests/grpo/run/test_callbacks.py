"""What callbacks of transformers see of a run, and what they can ask of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_runs import metrics_of, steps_of, tiny_config
from transformers.trainer_callback import ExportableState

from rankup.grpo.common.world import World
from rankup.grpo.run.callbacks import Callbacks, Requests, StepRecord

EVENTS = [name for name in dir(transformers.TrainerCallback) if name.startswith("on_")]


class Recording(transformers.TrainerCallback):
    """Keeps the name of every event and `state.global_step` at it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        for name in EVENTS:
            setattr(self, name, lambda args, state, control, name=name, **kwargs: self.record(name, state, control, kwargs))

    def record(self, name: str, state, control, kwargs) -> None:
        self.events.append((name, state.global_step))


class Asking(transformers.TrainerCallback):
    """Sets a flag of the control once a number of steps is done."""

    def __init__(self, flag: str, step: int) -> None:
        self.flag, self.step = flag, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.flag, True)


def test_events_come_in_the_order_of_transformers(make_trainer):
    seen = Recording()
    make_trainer(callbacks=[seen], eval_steps=1, save_steps=2, eval_before=False).train()
    assert seen.events == [
        ("on_init_end", 0), ("on_train_begin", 0), ("on_epoch_begin", 0),
        ("on_step_begin", 0), ("on_optimizer_step", 0), ("on_step_end", 1), ("on_log", 1), ("on_log", 1), ("on_evaluate", 1),
        ("on_step_begin", 1), ("on_optimizer_step", 1), ("on_step_end", 2), ("on_log", 2), ("on_save", 2),
        ("on_log", 2), ("on_evaluate", 2),
        ("on_log", 2), ("on_train_end", 2),
    ]  # fmt: skip


def test_the_state_has_the_run_s_history(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=5)
    assert (trainer.state.global_step, trainer.state.max_steps) == (0, 5)
    trainer.train()
    state, rows = trainer.state, metrics_of(tmp_path / "run")
    assert (state.global_step, state.epoch) == (5, 1.25)  # 12 rows, 3 prompts a step
    *of_steps, of_run = state.log_history
    assert set(of_run) >= {"train_runtime", "train_loss", "train_samples_per_second", "train_steps_per_second"}
    assert [row["step"] for row in of_steps] == [row["step"] for row in rows]
    for logged, row in zip(of_steps, rows, strict=True):
        assert logged["epoch"] == row["step"] / 4
        assert set(row) | {"epoch"} == set(logged)
    assert json.loads(json.dumps(state.log_history[1]))["reward"] == rows[1]["reward"]


def test_a_callback_can_end_the_training(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Asking("should_training_stop", 2)], max_steps=50)
    trainer.train()
    summary = trainer.summary
    assert summary["steps"] == 2 and not summary["interrupted"] and summary["evaluation"]["after"]["reward"] > 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


def test_a_run_that_a_callback_ended_resumes_where_it_ended(make_trainer, tmp_path):
    make_trainer(callbacks=[Asking("should_training_stop", 2)], max_steps=4).train()
    seen = Recording()
    trainer = make_trainer(callbacks=[seen], max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    summary = trainer.summary
    assert summary["steps"] == 4 and ("on_train_begin", 2) in seen.events
    assert [step for event, step in seen.events if event == "on_save"] == [4], "that of step 2 was written before"
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert [row["step"] for row in trainer.state.log_history if "reward" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [1, 2])
def test_a_callback_can_ask_for_an_evaluation_and_a_checkpoint(make_trainer, tmp_path, step):
    callbacks = [Asking("should_evaluate", step), Asking("should_save", step)]
    make_trainer(callbacks=callbacks, max_steps=3, save_steps=0, eval_before=False).train()
    assert [row["step"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row] == [step, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_00000{step}"]


def test_callbacks_get_the_model_that_is_trained(make_trainer):
    norms = []

    class Norms(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, *, model, processing_class, optimizer, **kwargs):
            norms.append(sum(p.norm().item() for name, p in model.named_parameters() if "lora_B" in name))
            assert processing_class.decode([65]) and optimizer.param_groups

    trainer = make_trainer(max_steps=3)
    trainer.add_callback(Norms)
    trainer.train()
    assert 0 < norms[0] != norms[1] != norms[2]


def test_the_example_of_the_documentation_stops_at_its_reward(make_trainer):
    page = (Path(__file__).resolve().parents[3] / "docs" / "runs.md").read_text()
    example = page.partition("## Callbacks")[2].partition("```python")[2].partition("trainer = ")[0]
    namespace: dict[str, Any] = {}
    exec(example, namespace)
    trainer = make_trainer(callbacks=[namespace["StopAtReward"](-1.0)], max_steps=9, eval_steps=2, eval_before=False)
    assert trainer.train().global_step == 2


def test_what_one_worker_asks_for_all_do():
    class OfTwoWorkers(World):
        def all_gather(self, local):
            return [local, (True, False, False)]

    callbacks = Callbacks([], tiny_config(Path("run")), num_rows=12, world=OfTwoWorkers(rank=0, size=2))
    callbacks.step_begin(0)
    record = StepRecord(groups=[], metrics={"reward": 0.5}, seconds={}, notes=[])
    callbacks.record_step(1, record)
    callbacks.step_end(record)
    assert callbacks.requests == Requests(stop=True, evaluate=False, save=False)


def test_callbacks_are_removed_by_class_or_instance(make_trainer):
    first, second = Recording(), Asking("should_save", 1)
    trainer = make_trainer(callbacks=[first, second])
    assert trainer.remove_callback(Asking) is second and trainer.remove_callback(Asking) is None
    assert trainer.remove_callback(first) is first
    with pytest.raises(TypeError, match=r"no transformers\.TrainerCallback"):
        trainer.add_callback(print)


def test_a_stop_of_one_run_does_not_end_the_next_one_of_the_same_trainer(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Asking("should_training_stop", 1)], max_steps=2)
    assert trainer.train().global_step == 1
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2]


def test_early_stopping_of_transformers_ends_the_run(make_trainer, tmp_path, capsys):
    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(constant, callbacks=[stopping], eval_steps=1, eval_before=False, max_steps=9)
    assert trainer.train().global_step == 3, "the first evaluation is the best one, and two do not exceed it"
    evaluated = [row["step"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row]
    assert evaluated == [1, 2, 3], "the last one is not repeated"
    assert trainer.summary["evaluation"]["after"]["reward"] == 1.0
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 1)
    with pytest.raises(AssertionError, match="requires IntervalStrategy"):
        make_trainer(callbacks=[stopping], eval_steps=0).train()


def test_callbacks_keep_their_state_when_a_run_resumes(make_trainer, tmp_path, capsys):
    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    def trainer(name: str, *others: Any):
        callbacks = [transformers.EarlyStoppingCallback(early_stopping_patience=3), *others]
        options = {"eval_steps": 1, "eval_before": False, "save_steps": 1, "output_dir": tmp_path / name}
        return make_trainer(constant, callbacks=callbacks, max_steps=9, **options)

    assert trainer("whole").train().global_step == 4
    with pytest.raises(ZeroDivisionError):
        trainer("run", Failing(3)).train()
    resumed = trainer("run")
    assert resumed.train(resume_from_checkpoint=True).global_step == 4, "not three evaluations more"
    assert resumed.state.best_global_step == 1
    without = make_trainer(constant, eval_steps=1, eval_before=False, max_steps=9, output_dir=tmp_path / "run")
    without.train(resume_from_checkpoint=True)
    assert "the state of a callback EarlyStoppingCallback, which this run does not have" in capsys.readouterr().out


class Failing(transformers.TrainerCallback):
    """Fails at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ZeroDivisionError


def test_a_state_that_is_no_plain_data_is_refused(make_trainer):
    class Odd(transformers.TrainerCallback, ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"model": object()}}

    with pytest.raises(ValueError, match=r"callback Odd: its state\(\) must be JSON data"):
        make_trainer(callbacks=[Odd()]).train()


@pytest.mark.parametrize("callback", [transformers.PrinterCallback, transformers.ProgressCallback])
def test_callbacks_of_transformers_run_unchanged(make_trainer, capsys, callback):
    make_trainer(callbacks=[callback]).train()
    assert "reward" in capsys.readouterr().out


def test_callbacks_read_the_configuration_by_the_names_of_trl(make_trainer):
    class Reads(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            names = ("eval_strategy", "metric_for_best_model", "per_device_train_batch_size", "dataloader_num_workers", "bf16")
            seen.update({name: getattr(args, name) for name in names}, text=args.to_json_string(), lr=args.learning_rate)

    seen: dict[str, Any] = {}
    make_trainer(callbacks=[Reads], dataloader_num_workers=3, eval_steps=1).train()
    assert json.loads(seen.pop("text"))["optim"]["max_steps"] == 2
    assert seen == {
        "eval_strategy": "steps", "metric_for_best_model": "eval_reward", "per_device_train_batch_size": 12,
        "dataloader_num_workers": 3, "bf16": False, "lr": 1e-2,
    }  # fmt: skip
