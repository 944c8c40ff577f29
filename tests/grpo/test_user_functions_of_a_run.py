"""Runs whose objective, advantages, group filter or prompts come from functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
from resumed import FaultError, failing_at, left_behind
from tiny_runs import many_low_ids, steps_of, tiny_config

from rankup import Completion, Group, GRPOTrainer, LossInputs, Prompt
from rankup.grpo.algorithm.advantages import group_advantages
from rankup.rewards.loading import load_object

Train = Any

FUNCTIONS = '''
import random

import torch


def loss(inputs):
    return -inputs.advantages * (inputs.logprobs - inputs.old_logprobs).exp()


def advantages(groups):
    return [[2 * r - max(g.scores.total) - min(g.scores.total) for r in g.scores.total] for g in groups]


def keep(group):
    return group.prompt.columns["target"] % 3 > 0


def sample(step, num_prompts, prompts):
    return random.Random(step).choices(range(len(prompts) // 2), k=num_prompts)


def rows(count=12):
    return [{"prompt": f"count to {n}", "target": n} for n in range(count)]
'''

OPTIONS = {"loss_type": "loss", "advantage_estimator": "advantages", "group_filter": "keep", "sampler": "sample"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one function of each kind, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def prompts_of(run: Path, step: int) -> list[str]:
    """The prompts of a step, one for each group."""
    table = pyarrow.parquet.read_table(run / "completions" / f"step_{step:06d}.parquet").to_pylist()
    return [row["prompt"] for row in table[::4]]


# --------------------------------------------------------------------------------------------------------- advantages


def as_the_built_in_estimator(groups: Sequence[Group]) -> list[tuple[float, ...]]:
    rewards = [group.scores.total for group in groups]
    return [one.advantages for one in group_advantages(rewards, estimator="group", scale_rewards="group")]


def test_the_built_in_advantages_from_a_function_give_the_same_run(train: Train, tmp_path: Path) -> None:
    train("built_in")
    train("function", advantage_estimator=as_the_built_in_estimator)
    assert left_behind(tmp_path / "built_in") == left_behind(tmp_path / "function")
    assert any("loss" in step for step in steps_of(tmp_path / "function"))


def test_advantages_that_differ_give_another_run(train: Train, tmp_path: Path) -> None:
    def opposite(groups: Sequence[Group]) -> list[list[float]]:
        return [[-advantage for advantage in row] for row in as_the_built_in_estimator(groups)]

    train("built_in", max_steps=1)
    train("opposite", max_steps=1, advantage_estimator=opposite)
    tables = [tmp_path / run / "completions" / "step_000001.parquet" for run in ("built_in", "opposite")]
    one, other = map(pyarrow.parquet.read_table, tables)
    assert one["reward"] == other["reward"]
    assert one["advantage"].to_pylist() == [-advantage for advantage in other["advantage"].to_pylist()]


def test_a_function_sees_columns_rewards_and_completions(make_trainer: Any) -> None:
    def looks(groups: Sequence[Group]) -> list[list[float]]:
        seen.extend(groups)
        return [[0.0] * len(group.completions) for group in groups]

    seen: list[Group] = []
    make_trainer(advantage_estimator=looks, max_steps=1, eval_before=False).train()
    assert len(seen) == 3
    for group in seen:
        assert group.prompt.content == f"count to {group.prompt.columns['target']}" and group.is_local
        assert group.scores.by_function["many_low_ids"] == group.scores.total
        assert all(isinstance(one, Completion) and one.text and one.token_ids for one in group.completions)


# ------------------------------------------------------------------------------------------------------- group filter


def even_targets(group: Group) -> bool:
    return group.prompt.columns["target"] % 2 == 0


def test_rejected_groups_are_not_trained_on_and_count_in_the_reported_rewards(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(output_dir=tmp_path / "all", max_steps=1).train()
    make_trainer(output_dir=tmp_path / "filtered", max_steps=1, group_filter=even_targets).train()
    (every,), (some,) = steps_of(tmp_path / "all"), steps_of(tmp_path / "filtered")
    rejected = [int(prompt.split()[-1]) % 2 == 1 for prompt in prompts_of(tmp_path / "filtered", 1)]
    assert 0 < sum(rejected) < 3
    assert some["filtered_ratio"] == pytest.approx(sum(rejected) / 3) and "filtered_ratio" not in every
    assert some["packing/completion_tokens"] == every["packing/completion_tokens"] * (3 - sum(rejected)) / 3
    assert {name: some[name] for name in ("reward", "reward_std", "completions/mean_length")} == {
        name: every[name] for name in ("reward", "reward_std", "completions/mean_length")
    }


def test_a_step_without_any_group_left_is_no_update(make_trainer: Any, tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(group_filter=lambda group: False, max_resampling_rounds=1)
    assert trainer.train().global_step == 2
    for step in steps_of(tmp_path / "run"):
        assert step["filtered_ratio"] == 1.0 and "loss" not in step and "updates" not in step
        assert step["reward"] > 0 and step["resampling_rounds"] == 1
    assert "(no update)" in capsys.readouterr().out
    assert trainer.summary["evaluation"]["before"] == trainer.summary["evaluation"]["after"]


def test_dynamic_sampling_replaces_rejected_groups(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(group_filter=even_targets, max_resampling_rounds=20, max_steps=3).train()
    for step in steps_of(tmp_path / "run"):
        assert step["packing/completion_tokens"] == 3 * 4 * 8, "three groups of four completions of eight tokens"
    assert any(step["resampling_rounds"] > 0 and step["filtered_ratio"] > 0 for step in steps_of(tmp_path / "run"))


def test_a_filter_sees_the_advantages(make_trainer: Any) -> None:
    def keep(group: Group) -> bool:
        seen.append(group)
        return True

    seen: list[Group] = []
    make_trainer(group_filter=keep, max_steps=1, eval_before=False).train()
    assert len(seen) == 3 and all(any(group.advantages) and group.has_variance for group in seen)


# ----------------------------------------------------------------------------------------------------- prompt sampler


def test_the_prompts_of_a_step_are_those_of_the_sampler(make_trainer: Any, tmp_path: Path) -> None:
    def backwards(step: int, num_prompts: int, prompts: Sequence[Prompt]) -> Sequence[int]:
        by_target = sorted(range(len(prompts)), key=lambda row: -prompts[row].columns["target"])
        return by_target[step * num_prompts : (step + 1) * num_prompts]

    make_trainer(sampler=backwards, completions_steps=1).train()
    assert prompts_of(tmp_path / "run", 1) == ["count to 11", "count to 10", "count to 9"]
    assert prompts_of(tmp_path / "run", 2) == ["count to 8", "count to 7", "count to 6"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1], r"must return the 3 row numbers of a step \(optim.prompts_per_step\), not 2"),
        ([0, 1, 12], r"must return row numbers from 0 to 11 \(got 12\)"),
        ([0, -1, 1], r"must return row numbers from 0 to 11 \(got -1\)"),
        ([0, 1.0, 2], "must return a list of row numbers: 'float' object cannot be interpreted as an integer"),
        (None, "must return a list of row numbers: 'NoneType' object is not iterable"),
    ],
)
def test_wrong_row_numbers_are_an_error_with_the_name_of_the_function(make_trainer: Any, rows: Any, message: str) -> None:
    def wrong(step: int, num_prompts: int, prompts: Sequence[Prompt]) -> Sequence[int]:
        return rows

    with pytest.raises(ValueError, match=rf"<locals>.wrong in {__name__}> {message}$"):
        make_trainer(sampler=wrong, eval_before=False).train()


# --------------------------------------------------------------------------------------------------- all four, and data


def test_functions_and_their_specs_give_the_same_run(train: Train, mine: Path, tmp_path: Path) -> None:
    train("specs", **{option: f"mine.py:{name}" for option, name in OPTIONS.items()})
    train("functions", **{option: load_object(f"mine.py:{name}") for option, name in OPTIONS.items()})
    assert left_behind(tmp_path / "specs") == left_behind(tmp_path / "functions")
    texts = [(tmp_path / run / "config.yaml").read_text() for run in ("specs", "functions")]
    named = [[line for line in text.splitlines() if "mine.py:" in line] for text in texts]
    assert named[0] == named[1] and len(named[0]) == 4


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", ["spec", "callable"])
def test_a_run_with_a_function_resumes_bit_exactly(train: Train, mine: Path, tmp_path: Path, option: str, form: str) -> None:
    spec = f"mine.py:{OPTIONS[option]}"
    function: Any = load_object(spec)
    value = spec if form == "spec" else lambda *inputs: function(*inputs)
    changes = {option: value, "max_steps": 4, "eval_steps": 0, "eval_before": False, "completions_steps": 1}
    train("undisturbed", **changes)
    with pytest.raises(RuntimeError, match="FaultError"):
        train("failed", reward=failing_at(2, FaultError()), **changes)
    train("failed", resume=True, **changes)
    assert left_behind(tmp_path / "undisturbed") == left_behind(tmp_path / "failed")


def test_another_function_is_a_change_and_the_same_one_by_its_spec_is_none(train: Train, mine: Path) -> None:
    changes = {"max_steps": 3, "eval_steps": 0, "eval_before": False}
    with pytest.raises(RuntimeError, match="FaultError"):
        train("run", reward=failing_at(2, FaultError()), sampler="mine.py:sample", **changes)
    with pytest.raises(ValueError, match=r"data.sampler: mine.py:sample in the checkpoint, <function .*<lambda> in .*> now"):
        train("run", resume=True, sampler=lambda step, num_prompts, prompts: [0, 1, 2], **changes)
    assert train("run", resume=True, sampler=load_object("mine.py:sample"), **changes)["steps"] == 3


@pytest.mark.parametrize("option", OPTIONS)
def test_mistakes_are_reported_before_anything_starts(make_trainer: Any, mine: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=r"mine.py has no 'los': did you mean"):
        make_trainer(**{option: "mine.py:los"})
    with pytest.raises(ValueError, match=r"is not a function$"):
        mine.write_text("value = 3")
        make_trainer(**{option: "mine.py:value"})
    with pytest.raises(ValueError, match=r"<function f in __main__> was passed in Python"):
        make_trainer(**{option: "<function f in __main__>"})
    assert not (tmp_path / "run").exists()


def test_an_objective_passed_as_a_function(make_trainer: Any, tmp_path: Path) -> None:
    def loss(inputs: LossInputs) -> torch.Tensor:
        assert isinstance(inputs, LossInputs)
        return 3 * inputs.advantages.abs() + 0 * inputs.logprobs

    make_trainer(loss_type=loss, max_steps=1, mode="none", veto=0.0, completions_steps=1).train()
    (step,) = steps_of(tmp_path / "run")
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "step_000001.parquet").to_pylist()
    tokens = sum(row["num_tokens"] for row in table)
    assert step["loss"] == pytest.approx(sum(3 * abs(row["advantage"]) * row["num_tokens"] for row in table) / tokens, rel=1e-5)


def test_a_function_as_data_set_gets_the_data_options(tiny_model_path: Any, mine: Path, tmp_path: Path) -> None:
    def prompts_of(function: Any, **options: Any) -> list[int]:
        config = tiny_config(tmp_path / "run", options=options)
        trainer = GRPOTrainer(str(tiny_model_path("llama")), many_low_ids, config, function, function)
        assert trainer.setup.eval_prompts == trainer.setup.inputs.train_prompts.rows
        return [row.columns["target"] for row in trainer.setup.inputs.train_prompts.rows]

    make_rows: Any = load_object("mine.py:rows")
    assert prompts_of(make_rows) == list(range(12))
    assert prompts_of(make_rows, count=5) == list(range(5))
    assert prompts_of(lambda count: datasets.Dataset.from_list(make_rows(count)), count=3) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^mine.py:rows cannot be called with the data options \(size\)"):
        prompts_of(make_rows, size=5)
    with pytest.raises(ValueError, match=r"<lambda> in .*> returned int: it must return rows"):
        prompts_of(lambda: 5)
