"""Complete runs on a tiny random model: the files they write, and how they react to failures."""

import importlib.metadata
import json
import signal

import pyarrow.parquet
import pytest
import yaml
from safetensors.torch import load_file
from tiny_runs import metrics_of, timeless

from rankup.grpo.common.interrupts import RunInterrupted


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.engine)])
def test_a_run_leaves_a_complete_folder(make_trainer, engine_shelf, tmp_path, capsys, engine):
    engine_shelf.close()  # the run starts a vLLM of its own, and two do not fit
    trainer = make_trainer(engine=engine)
    trainer.train()
    summary = trainer.summary
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "adapter", "checkpoints", "completions", "config.yaml", "evaluations", "learning_curve.png", "metrics.jsonl",
        "summary.json",
    }  # fmt: skip
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and not summary["interrupted"]
    assert set(summary["seconds"]) == {"rollout", "reward", "train", "publish", "checkpoint", "total"}
    assert all(0 <= summary["evaluation"][when]["reward"] <= 1 for when in ("before", "after"))
    assert yaml.safe_load((run / "config.yaml").read_text())["lora"]["rank"] == 8

    steps = [row for row in metrics_of(run) if "reward" in row]
    expected = {
        "reward", "reward_std", "rewards/many_low_ids/mean", "frac_reward_zero_std", "loss", "grad_norm", "entropy",
        "learning_rate", "completions/mean_length", "completions/clipped_ratio", "num_tokens", "targets",
        "sampling/sampling_logp_difference/mean", "time/rollout", "time/train", "time/publish",
        "tokens_per_second/rollout", "packing/token_ratio",
    }  # fmt: skip
    assert all(expected <= set(row) for row in steps)
    # fp32 on both sides: the sampler's log-probabilities are the trainer's, before and after the first update.
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in steps)

    table = pyarrow.parquet.read_table(run / "completions" / "step_000001.parquet").to_pylist()
    assert len(table) == 12 and {row["policy_version"] for row in table} == {table[0]["policy_version"]}
    assert "step 2/2" in capsys.readouterr().out


def test_the_same_run_twice_gives_the_same_bits(make_trainer, tmp_path):
    for name in ("one", "two"):
        make_trainer(output_dir=tmp_path / name).train()
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(one[key].equal(two[key]) for key in one)
    assert any(one[key].any() for key in one if "lora_B" in key), "training moved B away from zero"
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")


def test_interrupting_keeps_the_adapter_and_the_summary(make_trainer, tmp_path):
    calls = 0

    def interrupted(completion_ids, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4 + 3 + 1:  # evaluation, the first step, one group of the second
            signal.raise_signal(signal.SIGINT)
        return [float(len(set(ids))) for ids in completion_ids]

    with pytest.raises(RunInterrupted):
        make_trainer(reward=interrupted).train()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 2  # the step is finished first
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")


def test_a_second_run_moves_the_first_one_aside_and_eval_reads_the_adapter(make_trainer, tmp_path, capsys):
    trainer = make_trainer()
    trainer.train()
    first = trainer.summary
    trainer = make_trainer(max_steps=1)
    trainer.train()
    second = trainer.summary
    assert json.loads((tmp_path / "run.1" / "summary.json").read_text()) == first
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == second
    assert "is now in" in capsys.readouterr().out
    after = make_trainer().evaluate(adapter=tmp_path / "run" / "adapter")["eval_reward"]
    assert after == pytest.approx(second["evaluation"]["after"]["reward"])
    assert make_trainer().evaluate()["eval_reward"] == pytest.approx(second["evaluation"]["before"]["reward"])


def test_groups_without_variance_are_left_out_unless_a_penalty_reads_them(make_trainer, tmp_path):
    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    make_trainer(reward=constant, max_steps=1).train()
    (step,) = [row for row in metrics_of(tmp_path / "run") if "reward" in row]
    assert step["frac_reward_zero_std"] == 1.0 and "loss" not in step

    make_trainer(reward=constant, max_steps=1, beta=0.1, output_dir=tmp_path / "penalty").train()
    (step,) = [row for row in metrics_of(tmp_path / "penalty") if "reward" in row]
    assert step["kl"] == pytest.approx(0.0, abs=1e-6) and "loss" in step  # the adapter starts at zero


def test_completions_that_no_function_scores_are_reported_and_have_no_gradient(make_trainer, capsys):
    def silent(completions, **kwargs):
        return [None] * len(completions)

    make_trainer(reward=silent, max_steps=1).train()
    assert "step 1: no completion has a reward (functions: silent): nothing is learned" in capsys.readouterr().out


def test_a_run_that_asks_for_a_missing_vllm_starts_nothing(make_trainer, tmp_path, capsys, monkeypatch):
    def not_found(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    trainer = make_trainer(engine="vllm")
    monkeypatch.setattr(importlib.metadata, "version", not_found)
    with pytest.raises(ValueError, match=r"vLLM is not installed: pip install 'rankup.*rollout.engine=torch"):
        trainer.train()
    assert "starting vLLM" not in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_other_objectives_and_layouts_run(make_trainer, tmp_path):
    trainer = make_trainer(
        loss_type="grpo",
        num_iterations=2,
        scale_rewards="none",
        temperature=0.8,
        tokens_per_pack=40,
        gradient_checkpointing=True,
        lr_scheduler_type="cosine",
        eval_steps=1,
        save_steps=1,
        targets=["q_proj", "up_proj"],
    )
    trainer.train()
    summary = trainer.summary
    assert summary["steps"] == 2
    assert [row["step"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row] == [0, 1, 2]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all("q_proj" in key or "up_proj" in key for key in adapter)


def test_an_error_in_a_reward_function_saves_the_progress(make_trainer, tmp_path):
    def fails_in_the_second_step(completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise KeyError("no such answer")
        return [float(len(set(ids))) for ids in completion_ids]

    with pytest.raises(RuntimeError, match="fails_in_the_second_step"):
        make_trainer(reward=fails_in_the_second_step).train()
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name), "the first step's update is in it"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
