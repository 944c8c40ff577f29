"""Methods of transformers' trainer that scripts call after training, and subclasses of `GRPOTrainer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankup import GRPOTrainer


def test_metrics_and_state_are_saved_by_transformers_names(make_trainer, tmp_path: Path, capsys):
    trainer = make_trainer()
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    assert "***** train metrics *****" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "train_results.json").read_text()) == metrics
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["log_history"] == trainer.state.log_history


def test_a_script_asks_for_the_main_process_as_in_trl(make_trainer, capsys):
    trainer = make_trainer()
    assert trainer.is_world_process_zero() and trainer.is_local_process_zero() and trainer.accelerator.is_main_process
    trainer.accelerator.print("once")
    assert capsys.readouterr().out == "once\n"


def test_the_end_of_a_script_frees_the_memory(make_trainer):
    trainer = make_trainer()
    model = trainer.model
    trainer.end()
    assert trainer.model is not model


@pytest.mark.parametrize("name", ["compute_loss", "_generate_and_score_completions", "_calculate_rewards", "log", "evaluate"])
def test_a_subclass_cannot_override_what_is_never_called(name: str):
    with pytest.raises(ValueError, match=rf"^MyTrainer overrides {name}, which rankup's trainer does not call: use reward"):
        type("MyTrainer", (GRPOTrainer,), {name: lambda self: None, "train": lambda self: None})


def test_a_subclass_may_have_methods_of_its_own():
    class MyTrainer(GRPOTrainer):
        def train_and_save(self) -> None: ...

        def train(self, *args: object, **kwargs: object) -> None: ...  # type: ignore[override]

    assert MyTrainer.train_and_save
