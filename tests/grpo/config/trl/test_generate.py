"""What is generated is current, and the types of the keyword arguments report mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rankup.grpo.config.run_config import known_keys
from rankup.grpo.config.trl.arguments import Arguments
from rankup.grpo.config.trl.fields import ALL_NAMES
from rankup.grpo.config.trl.generate import PAGE, TYPES_FILE, page, types_module

ROOT = Path(__file__).parents[4]
COMMAND = "run: python -m rankup.grpo.config.trl.generate"

SCRIPT = """
import torch

from rankup import Group, GRPOConfig, LossInputs


def loss(inputs: LossInputs) -> torch.Tensor:
    return -inputs.advantages * inputs.logprobs


def keep(group: Group) -> bool:
    return group.has_variance


GRPOConfig(loss_type=loss, advantage_estimator="mine.py:f", group_filter=keep, sampler=lambda step, count, prompts: [0])
GRPOConfig(
    learning_rate=1e-6,
    per_device_train_batch_size=8,
    use_vllm=True,
    vllm_mode="colocate",
    report_to=["wandb"],
    optim="adamw_torch",
    lora={"rank": 8},
    model="some/model",
    eval_steps=0.1,
    save_strategy="no",
    functions=["a:f", {"function": "b:g"}],
    scale_rewards=False,
)
GRPOConfig(learning_rate="x" * 2)
GRPOConfig(per_device_train_batch_sizes=8)
GRPOConfig(use_vllm="yes")
GRPOConfig(lr_scheduler_type="cosin")
GRPOConfig(group_filter=3)
"""


def test_the_types_are_current():
    assert (ROOT / TYPES_FILE).read_text() == types_module(), COMMAND


def test_the_page_is_current():
    assert (ROOT / PAGE).read_text() == page(), COMMAND


def test_the_types_have_every_name_that_is_accepted():
    keys = known_keys()
    flat = {dotted.rpartition(".")[2] for dotted in keys.dotted()}
    assert set(Arguments.__annotations__) == {*keys.sections, *keys.top_level, *flat, *ALL_NAMES}


@pytest.mark.slow
def test_a_type_checker_reports_mistakes_in_a_script_and_nothing_else(tmp_path: Path):
    (tmp_path / "rankup").symlink_to(ROOT)
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = Path(sys.prefix)
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"venvPath": "{environment.parent}", "venv": "{environment.name}", "include": ["script.py"]}}'
    )
    result = subprocess.run(
        [environment / "bin" / "pyright", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    errors = [line for line in result.stdout.splitlines() if " - error: " in line]
    last = SCRIPT.count("\n")
    assert [int(line.split(":")[1]) for line in errors] == [last - 4, last - 3, last - 2, last - 1, last], result.stdout
