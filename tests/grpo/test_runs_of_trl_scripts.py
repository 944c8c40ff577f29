"""Complete runs whose configuration is written in TRL's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import ROWS, steps_of

TRL = {"prompts_per_step": None, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": -1}
"""Three prompts with four completions, as in the other tiny runs, until the epochs are over."""


def test_a_script_with_trls_batch_and_epochs_makes_its_steps(make_trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture):
    trainer = make_trainer(**TRL, num_train_epochs=1, eval_strategy="epoch", save_strategy="epoch", eval_on_start=False)
    assert (trainer.args.optim.max_steps, trainer.args.logging.eval_steps) == (len(ROWS) // 3, len(ROWS) // 3)
    assert trainer.train().global_step == 4
    shown = capsys.readouterr().out
    assert shown.count("a step: 3 prompts x 4 completions = 12, 1 optimizer step on them; 4 steps in all") == 1
    assert "step 4/4" in shown
    assert len(steps_of(tmp_path / "run")) == 4
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["optim"]["max_steps"], config["optim"]["num_train_epochs"]) == (4, None)
    assert not any(name in str(config) for name in TRL if name not in ("max_steps", "prompts_per_step"))


def test_a_run_in_epochs_resumes(make_trainer: Any, tmp_path: Path):
    options = {**TRL, "num_train_epochs": 0.5}
    assert make_trainer(**options).train().global_step == 2
    assert make_trainer(**{**options, "num_train_epochs": 0.75}).train(resume_from_checkpoint=True).global_step == 3
    assert len(steps_of(tmp_path / "run")) == 3


def test_the_order_of_the_data_has_a_seed_of_its_own(make_trainer: Any):
    orders = [
        [prompt.columns["target"] for prompt in make_trainer(**seeds).setup.sampler.batch(0)]
        for seeds in ({"data_seed": 5}, {"data_seed": 5, "seed": 1}, {"data_seed": 6}, {"seed": 5})
    ]
    assert orders[0] == orders[1] == orders[3] != orders[2]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_corrected_kl_penalty_changes_the_update(make_trainer: Any, tmp_path: Path, num_iterations: int):
    norms = []
    for is_corrected in (False, True):
        folder = tmp_path / str(is_corrected)
        make_trainer(output_dir=folder, beta=0.5, use_bias_correction_kl=is_corrected, num_iterations=num_iterations).train()
        norms.append([row["grad_norm"] for row in steps_of(folder)])
    assert norms[0][-1] != norms[1][-1]
