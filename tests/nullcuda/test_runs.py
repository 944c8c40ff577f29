"""Complete runs of a tiny model by the command line: vLLM, start-up proof, evaluation, updates, checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = """
model: {model}
lora: {{rank: 16, alpha: 32}}
rollout: {{num_generations: 4, max_prompt_length: 48, max_completion_length: 8, enforce_eager: true, lora_path: dense}}
optim: {{prompts_per_step: 2, max_steps: 2, learning_rate: 1e-3}}
data: {{train: data.jsonl, eval: data.jsonl}}
rewards: {{functions: [reward.py:score]}}
checkpoint: {{save_steps: 1}}
logging: {{run_name: run}}
"""
REWARD = """
def score(completions, completion_ids, target, **kwargs):
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]
"""


def rankup(*words: str, cwd: Path, gpu: str = "h100", devices: int = 1) -> str:
    """What a command prints on null devices."""
    environment = os.environ | {"NULLCUDA_GPU": gpu, "NULLCUDA_DEVICES": str(devices)}
    command = [str(Path(sys.executable).with_name("rankup")), *words]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    assert "REFUSED" not in output, output[-6000:]
    return output


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "reward" in row]


@pytest.fixture
def make_run(tiny_model_path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with `run.yaml` and its files, for a kind of tiny model."""

    def make(kind: str) -> Path:
        (tmp_path / "run.yaml").write_text(RUN.format(model=tiny_model_path(kind)))
        (tmp_path / "reward.py").write_text(REWARD)
        rows = [json.dumps({"prompt": f"count to {n}", "target": n}) for n in range(1, 7)]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        return tmp_path

    return make


def assert_sampler_and_trainer_agree(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        assert step["grad_norm"] > 0 and step["sampling/kl"] < 0.01, step


def test_the_doctor_finds_no_problems(tmp_path: Path) -> None:
    found = json.loads(rankup("doctor", "--json", cwd=tmp_path))
    assert found["healthy"] is True, found
    assert "H100" in json.dumps(found)


def test_a_run_is_resumed_and_evaluated(make_run: Callable[[str], Path]) -> None:
    folder = make_run("llama")
    rankup("train", "run.yaml", "optim.max_steps=1", cwd=folder)
    rankup("train", "run.yaml", "--resume", cwd=folder)
    steps = steps_of(folder)
    assert len(steps) == 2
    assert_sampler_and_trainer_agree(steps)
    assert "reward" in rankup("eval", "runs/run", cwd=folder)


def test_a_run_in_4_bits_with_an_8_bit_optimizer(make_run: Callable[[str], Path]) -> None:
    folder = make_run("llama64")
    options = ("model.load_in=nf4", "optim.optimizer=adamw_8bit", "optim.gradient_checkpointing=true")
    rankup("train", "run.yaml", *options, "rollout.lora_path=punica", cwd=folder, gpu="4090")
    assert_sampler_and_trainer_agree(steps_of(folder))


@pytest.mark.ray
def test_two_workers_share_a_run(make_run: Callable[[str], Path]) -> None:
    folder = make_run("llama")
    rankup("train", "run.yaml", "cluster.workers=2", cwd=folder, devices=2)
    assert_sampler_and_trainer_agree(steps_of(folder))
