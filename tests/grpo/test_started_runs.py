"""Runs that start from an existing adapter: evaluations, the reference of the KL penalty, resuming, and other commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from resumed import FaultError, failing_at, left_behind
from stock_adapters import change_weights, save_stock_adapter, stock_logprobs
from tiny_runs import ROWS, steps_of, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.cli.main import main
from rankup.grpo.config import load_config
from rankup.grpo.model.prove import trainer_logprobs
from rankup.grpo.update.session import open_session

SEQUENCES = [list(range(5, 30))]


@pytest.fixture
def sft(tiny_model_path, tmp_path: Path) -> Path:
    """An adapter of stock PEFT of rank 4 on the attention, with random weights."""
    folder, targets = tmp_path / "sft", ["q_proj", "v_proj"]
    return save_stock_adapter(tiny_model_path("llama"), folder, strength=0.3, r=4, lora_alpha=6, target_modules=targets)


def rewards(trainer: GRPOTrainer) -> tuple[float, float]:
    """The evaluations before and after its run."""
    trainer.train()
    summary = trainer.summary
    return summary["evaluation"]["before"]["reward"], summary["evaluation"]["after"]["reward"]


def test_a_run_continues_exactly_where_the_run_before_has_ended(make_trainer, tmp_path: Path) -> None:
    _, after = rewards(make_trainer(output_dir=tmp_path / "a", use_rslora=True, max_steps=3))
    adapter = str(tmp_path / "a" / "adapter")
    same = {"rank": 8, "alpha": 16, "use_rslora": True}
    before_any, _ = rewards(make_trainer(output_dir=tmp_path / "new", **same, max_steps=1))
    assert before_any != after
    for name, options in {"b": same, "c": {"rank": 32, "alpha": 32, "use_rslora": False}}.items():
        trainer = make_trainer(output_dir=tmp_path / name, start_from=adapter, max_steps=1, **options)
        before, after_one_more = rewards(trainer)
        assert before == after
        assert after_one_more != after


def test_ranks_of_the_adapter_are_in_the_run_folder(tiny_model_path, sft: Path, tmp_path: Path, capsys) -> None:
    config_file = tmp_path / "run.yaml"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    config_file.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(tiny_model_path("llama")), "dtype": "float32"},
                "lora": {"start_from": str(sft)},
                "rollout": {"engine": "torch", "num_generations": 4, "max_prompt_length": 64, "max_completion_length": 8},
                "optim": {"prompts_per_step": 3, "max_steps": 1},
                "data": {"train": str(rows), "eval": str(rows)},
                "rewards": {"functions": [f"{Path(__file__).parents[1] / 'support' / 'tiny_runs.py'}:many_low_ids"]},
                "logging": {"output_dir": str(tmp_path / "run")},
            }
        )
    )
    assert main(["train", str(config_file)]) == 0
    assert f"training starts from the adapter {sft}: rank 4, alpha 6" in capsys.readouterr().out
    lora = load_config(tmp_path / "run" / "config.yaml").lora
    assert (lora.rank, lora.alpha, lora.targets, lora.start_from) == (4, 6.0, ["q_proj", "v_proj"], str(sft))
    shutil.rmtree(sft)
    assert main(["eval", str(tmp_path / "run")]) == 0, "the run's adapter needs no other one"
    assert main(["train", str(config_file)]) == 1
    assert f"lora.start_from: {sft}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}])
@pytest.mark.parametrize("reference", ["start", "base"])
def test_the_penalty_is_to_the_policy_that_training_started_from(
    make_trainer, sft: Path, tmp_path: Path, reference: str, options: dict[str, Any]
) -> None:
    changes = {"rank": 16, "alpha": 6, "targets": "all-linear", "beta": 0.1, "reference": reference, "max_steps": 3, **options}
    make_trainer(start_from=str(sft), **changes).train()
    first, *later = [step["kl"] for step in steps_of(tmp_path / "run")]
    if reference == "start":
        assert first == 0.0 and min(later) > 1e-6
    else:
        assert min(first, *later) > 1e-3


def test_without_an_adapter_both_references_are_the_base_model(make_trainer, tmp_path: Path) -> None:
    for reference in ("start", "base"):
        make_trainer(output_dir=tmp_path / reference, beta=0.1, reference=reference, learning_rate=0.1).train()
    start, base = ([step["kl"] for step in steps_of(tmp_path / name)] for name in ("start", "base"))
    assert start == base and start[1] > 1e-4


def test_the_slots_hold_the_policy_again_even_after_an_exception(tiny_model_path, sft: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", start_from=str(sft), targets="all-linear", beta=0.1)
    with open_session(config, str(tiny_model_path("llama"))) as session:
        policy = session.policy
        at_start = trainer_logprobs(policy, SEQUENCES)
        with torch.no_grad():
            for master in policy.masters:
                master.add_(0.05)
        session.publish()
        current = trainer_logprobs(policy, SEQUENCES)
        with pytest.raises(FaultError), policy.as_reference():
            assert trainer_logprobs(policy, SEQUENCES) == at_start != current
            raise FaultError
        assert trainer_logprobs(policy, SEQUENCES) == current
        assert session.engine.prompt_logprobs(SEQUENCES)[0] == pytest.approx(current[0], abs=1e-4)


@pytest.mark.engine
def test_vllm_samples_from_the_adapter_that_training_starts_from(
    tiny_model_path, vllm_engine, sft: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", engine="vllm", start_from=str(sft), targets="all-linear", beta=0.1)
    (expected,) = stock_logprobs(tiny_model_path("llama"), sft, SEQUENCES)
    with open_session(config, str(tiny_model_path("llama")), engine=vllm_engine) as session:
        assert session.engine.prompt_logprobs(SEQUENCES)[0] == pytest.approx(expected, abs=1e-4)
        with torch.no_grad():
            for master in session.policy.masters:
                master.add_(0.05)
        session.publish()
        current = session.engine.prompt_logprobs(SEQUENCES)
        with session.policy.as_reference():
            assert trainer_logprobs(session.policy, SEQUENCES)[0] == pytest.approx(expected, abs=1e-4)
        assert session.engine.prompt_logprobs(SEQUENCES) == current
        assert current[0] != pytest.approx(expected, abs=1e-2)


def test_a_run_does_not_start_from_the_folder_that_it_replaces(make_trainer, tmp_path: Path) -> None:
    make_trainer(max_steps=1).train()
    with pytest.raises(ValueError, match=r"^lora.start_from: .*run/adapter is inside .*run, which a new run replaces: set"):
        make_trainer(start_from=str(tmp_path / "run" / "adapter"))


# Resuming

STARTED: dict[str, Any] = {"rank": 16, "targets": "all-linear", "beta": 0.1, "learning_rate": 1e-2}


@pytest.fixture
def interrupted(train: Callable[..., Any], sft: Path, tmp_path: Path) -> Path:
    """A run from the adapter that failed in its sixth step."""
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(5, FaultError()), start_from=str(sft), **STARTED)
    return tmp_path / "failed"


def test_a_resumed_run_equals_the_undisturbed_one(train, interrupted: Path, sft: Path, tmp_path: Path) -> None:
    train("undisturbed", start_from=str(sft), **STARTED)
    train("failed", start_from=str(sft), resume=True, **STARTED)
    assert left_behind(interrupted) == left_behind(tmp_path / "undisturbed")
    assert min(step["kl"] for step in steps_of(interrupted)[1:]) > 0


def test_a_run_whose_adapter_has_changed_does_not_resume(train, interrupted: Path, sft: Path) -> None:
    change_weights(sft, lambda weights: [tensor.mul_(1.01) for tensor in weights.values()])
    with pytest.raises(ValueError, match=r"data or code differ:\n  adapter of lora\.start_from: \w{32} in the"):
        train("failed", start_from=str(sft), resume=True, **STARTED)
    train("failed", start_from=str(sft), resume=True, allow_changes=True, **STARTED)


def test_a_run_whose_adapter_is_gone_does_not_resume(train, interrupted: Path, sft: Path) -> None:
    shutil.rmtree(sft)
    with pytest.raises(ValueError, match=f"^lora.start_from: {sft}: no such folder"):
        train("failed", start_from=str(sft), resume=True, **STARTED)


def test_another_start_or_reference_is_a_change(train, interrupted: Path, sft: Path) -> None:
    with pytest.raises(ValueError, match=rf"\n  lora\.start_from: {sft} in the checkpoint, None now\n"):
        train("failed", resume=True, **STARTED)
    with pytest.raises(ValueError, match=r"\n  algorithm\.reference: start in the checkpoint, base now\n"):
        train("failed", start_from=str(sft), resume=True, reference="base", **STARTED)


def test_only_a_run_that_starts_from_an_adapter_has_its_fingerprint(make_trainer, sft: Path) -> None:
    inputs = {"training data", "evaluation data", "reward functions", "code of functions"}
    assert set(make_trainer().setup.fingerprint) == inputs
    assert "adapter of lora.start_from" in make_trainer(start_from=str(sft), rank=4, targets="all-linear").setup.fingerprint
