"""Alarms in complete runs: each triggers on an injected fault, acts, and stays silent over a healthy run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import metrics_of, steps_of
from transformers import TrainerCallback

from rankup.grpo.common.errors import TrainingStoppedError
from rankup.rollout.torch_engine import TorchEngine

HEALTHY = {"max_steps": 40, "learning_rate": 1e-3, "prompts_per_step": 8, "num_generations": 8, "eval_before": False}


def low_ids(completion_ids, **kwargs):
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(make_trainer, tmp_path, capsys):
    """Train with changes; returns the steps' metrics and the printed output."""

    def train(reward=low_ids, **changes):
        make_trainer(reward=reward, **changes).train()
        return steps_of(tmp_path / "run"), capsys.readouterr().out

    return train


def test_a_healthy_run_of_forty_steps_is_silent(run):
    steps, printed = run(**HEALTHY)
    assert len(steps) == 40
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.1, "it learns"
    assert all(step["guards/alarms"] == 0 and step["update_skipped"] == 0 for step in steps)
    assert steps[-1]["guards/learning_rate_factor"] == 1.0
    notes = [line for line in printed.splitlines() if line.startswith("note: step")]
    of_completions = ("all 64 completions were cut off", "special tokens")  # a random model's
    assert not [note for note in notes if not any(text in note for text in of_completions)], notes


def test_a_non_finite_gradient_is_skipped_and_reported(run):
    def explodes(completion_ids, trainer_state, **kwargs):
        scale = 1e38 if trainer_state.global_step == 7 else 1.0
        return [scale * reward for reward in low_ids(completion_ids)]

    steps, printed = run(explodes, **HEALTHY | {"max_steps": 10, "scale_rewards": "none"}, epsilon=0.2)
    assert steps[7]["grad_norm"] is None, "JSON has no inf"
    assert [step["update_skipped"] for step in steps] == [0.0] * 7 + [1.0] + [0.0] * 2
    assert "step 8" in printed and "gradient" in printed


def test_a_tenfold_gradient_is_skipped(run):
    def tenfold(completion_ids, trainer_state, **kwargs):
        return [(10 if trainer_state.global_step == 8 else 1) * reward for reward in low_ids(completion_ids)]

    steps, printed = run(tenfold, **HEALTHY | {"max_steps": 10, "scale_rewards": "none"})
    skipped = [index for index, step in enumerate(steps) if step["update_skipped"]]
    assert skipped == [8]
    assert steps[8]["grad_norm"] > 5 * steps[7]["grad_norm"]
    assert "skipped" in printed


def test_falling_entropy_triggers_an_alarm_and_the_policy_is_rolled_back(run):
    """A bonus of the wrong sign drives the entropy down, and the reward has nothing to say about it."""

    def noise(completion_ids, **kwargs):
        return [float(hash(tuple(ids)) % 2) for ids in completion_ids]

    changes = HEALTHY | {"max_steps": 30, "learning_rate": 2e-2, "entropy_coef": -3.0}
    steps, printed = run(noise, **changes)
    assert "entropy" in printed
    assert steps[-1]["guards/alarms"] >= 1
    assert steps[-1]["guards/restores"] >= 1
    assert steps[-1]["guards/learning_rate_factor"] < 1.0
    unguarded, _ = run(noise, **changes, enabled=False)
    assert unguarded[-1]["entropy"] < 0.1 * unguarded[0]["entropy"]
    assert max(step["entropy"] for step in steps[-5:]) > 2 * unguarded[-1]["entropy"]


def test_a_sampler_with_another_adapter_ends_the_run(make_trainer, tmp_path, capsys, monkeypatch):
    """The engine samples from another adapter than the one that is trained: every step is skipped, and ten are enough."""
    rollout = TorchEngine.rollout

    def with_another_adapter(engine: TorchEngine, *args, **kwargs) -> Iterator:
        kept = {name: slot.b.clone() for name, slot in engine.slots.items()}
        generator = torch.Generator().manual_seed(0)
        for slot in engine.slots.values():
            slot.b.add_(0.3 * torch.randn(slot.b.shape, generator=generator))
        try:
            yield from rollout(engine, *args, **kwargs)
        finally:
            for name, b in kept.items():
                engine.slots[name].b.copy_(b)

    class AfterTheProof(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            monkeypatch.setattr(TorchEngine, "rollout", with_another_adapter)

    trainer = make_trainer(reward=low_ids, **HEALTHY)
    trainer.add_callback(AfterTheProof())
    with pytest.raises(TrainingStoppedError, match="skipped"):
        trainer.train()
    printed = capsys.readouterr().out
    steps = steps_of(tmp_path / "run")
    assert "sampler" in printed
    assert len(steps) == 10 and all(step["update_skipped"] for step in steps)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not any(t.any() for name, t in adapter.items() if "lora_B" in name), "no update was ever applied"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 10


def test_guards_that_are_off_leave_the_run_alone(run):
    def tenfold(completion_ids, trainer_state, **kwargs):
        return [(10 if trainer_state.global_step == 8 else 1) * reward for reward in low_ids(completion_ids)]

    steps, printed = run(tenfold, **HEALTHY | {"max_steps": 10, "scale_rewards": "none", "enabled": False})
    assert not any(step["update_skipped"] for step in steps)
    assert "skipped" not in printed and steps[-1]["guards/alarms"] == 0


def test_a_fallen_reward_ends_the_run_with_the_last_healthy_adapter(run):
    """From step 15 on the reward is inverted: the policy unlearns, and the run does not end with that policy."""

    def turns(completion_ids, trainer_state, **kwargs):
        sign = 1 if trainer_state.global_step < 15 else -1
        return [0.5 + sign * (reward - 0.5) for reward in low_ids(completion_ids)]

    steps, printed = run(turns, **HEALTHY | {"max_steps": 30, "learning_rate": 5e-3})
    assert steps[-1]["guards/restores"] >= 1 or "the run ends with the adapter from before the update of step" in printed
    assert math.isfinite(steps[-1]["grad_norm"])


def test_a_fallen_evaluation_is_detected_and_the_run_ends_with_the_best(run, tmp_path):
    """From step 12 on training rewards the opposite, and the alarms that would detect it are off: only evaluations do."""

    def turned(completion_ids, trainer_state, **kwargs):
        is_evaluation = len(completion_ids) == 1
        sign = 1 if is_evaluation or trainer_state.global_step < 12 else -1
        return [0.5 + sign * (reward - 0.5) for reward in low_ids(completion_ids)]

    blind = {f"{name}_{limit}": None for name in ("reward", "entropy") for limit in ("watch", "stop")}
    changes = HEALTHY | blind | {"max_steps": 30, "learning_rate": 5e-3, "eval_steps": 3, "eval_before": True}
    steps, printed = run(turned, **changes)
    evaluations = [row["eval_reward"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row]
    best, gain = max(evaluations), max(evaluations) - evaluations[0]
    assert gain > 0.1, "it learns first"
    assert min(evaluations[4:]) < best - 0.3 * gain, "and unlearns"
    assert steps[-1]["guards/restores"] >= 1 and steps[-1]["guards/learning_rate_factor"] < 1.0
    assert "from the evaluation after step" in printed
    assert evaluations[-1] >= best - 0.2 * gain, "0.05, and a standard error of four prompts"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation"]["after"]["reward"] == evaluations[-1]

    run(turned, **changes, enabled=False)
    evaluations = [row["eval_reward"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row]
    assert evaluations[-1] < max(evaluations) - 0.3 * (max(evaluations) - evaluations[0])
