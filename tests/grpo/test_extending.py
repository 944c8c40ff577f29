"""The examples of docs/extending.md run on a tiny model, and its tables name what exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from pages import ROOT, code_blocks
from tiny_runs import steps_of

import rankup
from rankup.rewards.combining import Scores

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = [block for language, block in code_blocks(PAGE) if language == "python"]
FOUR = ("quadratic", "above_the_median", "is_learnable", "short_prompts_first")


def example(name: str) -> dict[str, Any]:
    """What the example with this function defines."""
    (code,) = [block for block in EXAMPLES if f"def {name}(" in block]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(code, namespace)
    return namespace


@pytest.fixture
def run_of(make_trainer: Any, tmp_path: Path) -> Any:
    """The steps and the completions of a run with the configuration of an example."""

    def train(name: str, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        config: rankup.GRPOConfig = example(name)["config"]
        sections = {"algorithm": config.algorithm, "data": config.data}
        make_trainer(**sections, completions_steps=1, eval_before=False, output_dir=tmp_path / name, **changes).train()
        tables = sorted((tmp_path / name / "completions").iterdir())
        return steps_of(tmp_path / name), [row for path in tables for row in pyarrow.parquet.read_table(path).to_pylist()]

    return train


def test_there_is_one_example_for_each_function() -> None:
    assert len(EXAMPLES) == len(FOUR)
    assert [name for name in FOUR if not callable(example(name)[name])] == []


def test_the_example_of_an_objective_trains(run_of: Any) -> None:
    steps, _ = run_of("quadratic")
    assert [step["updates"] for step in steps] == [2.0, 2.0]


def test_the_example_of_advantages(run_of: Any) -> None:
    _, rows = run_of("above_the_median")
    assert len(rows) == 2 * 3 * 4
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        _, low, high, _ = sorted(row["reward"] for row in group)
        assert [row["advantage"] for row in group] == pytest.approx([row["reward"] - (low + high) / 2 for row in group])


def test_the_example_of_a_group_filter(run_of: Any) -> None:
    def zero_or_one(completion_ids: list, target: list, **kwargs: Any) -> list[float]:
        return [float(n % 3 > 0 and ids[0] < 130) for ids, n in zip(completion_ids, target, strict=True)]

    steps, rows = run_of("is_learnable", reward=zero_or_one)
    shares = [sum(row["reward"] for row in rows[start : start + 4]) / 4 for start in range(0, len(rows), 4)]
    rejected = [not 0.1 <= share <= 0.9 for share in shares]
    groups = [3 * (1 + int(step["resampling_rounds"])) for step in steps]
    assert sum(rejected) == pytest.approx(sum(n * step["filtered_ratio"] for n, step in zip(groups, steps, strict=True)))
    assert 0 < sum(rejected) < len(rejected)


def test_the_example_of_a_prompt_sampler(run_of: Any) -> None:
    rows = [{"prompt": "x" * (1 + n), "target": n} for n in range(12)]
    _, completions = run_of("short_prompts_first", rows=rows)
    assert {row["prompt"] for row in completions} == {"x", "xx", "xxx"}
    prompts = [rankup.Prompt("x", (1,) * (n + 1)) for n in range(12)]
    function = example("short_prompts_first")["short_prompts_first"]
    assert {index for step in (100, 101, 102, 200) for index in function(step, 6, prompts)} > {10, 11}


def names_in_table(first: str) -> set[str]:
    """The names in the first column of the table with this heading."""
    (table,) = re.findall(rf"^\| {first} \|.*\n\|-.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return {name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}


def test_the_tables_name_the_fields_of_the_types() -> None:
    fields = {field.name for field in dataclasses.fields(rankup.LossInputs)}
    assert names_in_table("`LossInputs`") == fields
    groups = {field.name for field in dataclasses.fields(rankup.Group)} - {"passes_filter"}
    scores = {f"scores.{field.name}" for field in dataclasses.fields(Scores)}
    named = names_in_table("`Group`")
    assert named <= groups | scores and {name.partition(".")[0] for name in named} == groups


@pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")
def test_the_methods_of_trl_that_the_page_names_exist() -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer as TrlTrainer

    named = names_in_table("TRL")
    assert len(named) > 8 and [name for name in named if not hasattr(TrlTrainer, name)] == []


def test_the_data_types_are_public() -> None:
    assert {"Completion", "Group", "LossInputs", "Prompt"} <= set(rankup.__all__)
    for name in ("Completion", "Group", "LossInputs", "Prompt"):
        assert getattr(rankup, name).__name__ == name
