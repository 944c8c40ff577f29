"""Options of evaluations: how completions are sampled, sets with options of their own, and their reward functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import GRPOConfig, RewardFunction, dump_config, eval_sampling, load_config
from rankup.grpo.config.data import EvalSet

ErrorOf = Callable[..., str]
Load = Callable[..., GRPOConfig]


def test_an_evaluation_is_greedy_by_default():
    config = GRPOConfig(temperature=0.7, top_p=0.9)
    assert config.data.is_eval_greedy and eval_sampling(config) == config.rollout.greedy()


@pytest.mark.parametrize("name", ["eval_samples", "num_generations_eval"])
def test_several_completions_are_sampled_as_in_training(name: str):
    values: dict[str, Any] = {name: 4, "temperature": 0.7, "top_p": 0.9}
    config = GRPOConfig(**values)
    assert eval_sampling(config) == config.rollout.as_in_training(4)
    assert getattr(config, name) == config.data.eval_samples == 4


def test_temperature_and_top_p_of_evaluations_replace_those_of_training():
    sampling = eval_sampling(GRPOConfig(temperature=0.7, top_p=0.9, top_k=5, eval_temperature=1.2, eval_top_p=0.5))
    assert (sampling.num_generations, sampling.temperature, sampling.top_p, sampling.top_k) == (1, 1.2, 0.5, 5)
    assert eval_sampling(GRPOConfig(eval_temperature=0, eval_samples=1)).temperature == 0


@settings(deadline=None)
@given(
    samples=st.none() | st.integers(1, 8),
    temperature=st.none() | st.sampled_from([0.0, 0.5, 1.5]),
    top_p=st.none() | st.sampled_from([0.5, 1.0]),
)
def test_an_evaluation_samples_as_asked_or_is_refused(samples: int | None, temperature: float | None, top_p: float | None):
    is_greedy = temperature == 0 or (temperature is None and samples is None)
    values: dict[str, Any] = {"eval_samples": samples, "eval_temperature": temperature, "eval_top_p": top_p}
    if is_greedy and ((samples or 1) > 1 or top_p is not None):
        with pytest.raises(ValueError, match=r"data\.eval_(temperature|top_p)"):
            GRPOConfig(**values)
        return
    config = GRPOConfig(**values)
    sampling = eval_sampling(config)
    assert sampling.num_generations == (samples or 1)
    assert sampling.temperature == (0.0 if is_greedy else config.rollout.temperature if temperature is None else temperature)
    assert sampling.top_p == (1.0 if top_p is None else top_p)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data={eval_samples: 2, eval_temperature: 0}", "data.eval_temperature: must be above 0 for eval_samples 2: at 0 all"),
        ("data.eval_top_p=0.9", "data.eval_top_p: has no effect on greedy evaluations"),
        ("data={eval_samples: 2, eval_temperature: 5}", "data.eval_temperature: must be 0.01 to 2 with vLLM"),
        ("data.eval_samples=0", "data.eval_samples: must be at least 1 (got 0)"),
        ("data.eval={source: a.jsonl, rows: 3}", "data.eval: a set with options needs a name: write {NAME: {source: ...}}"),
        ("data.eval={a: {rows: 3}}", "data.eval.a.source: "),
        ("data.eval={a: {source: a.jsonl, split_: x}}", "data.eval.a.split_: unknown key"),
        ("logging.num_generations_eval=4", "logging.num_generations_eval: unknown key; it was renamed to data.eval_samples"),
        ("rewards.eval_functions={a: []}", "rewards.eval_functions: a has no functions"),
        ("rewards.eval_functions={a: [{functoin: b}]}", "functoin"),
    ],
)
def test_mistakes_are_named(error_of: ErrorOf, override: str, message: str):
    assert message in error_of("", override)


def test_functions_of_a_set_that_does_not_exist_are_refused(error_of: ErrorOf):
    text = "{data: {eval: {easy: a.jsonl}}, rewards: {eval_functions: {esay: last_number}}}"
    assert error_of(text) == "rewards.eval_functions.esay: no evaluation set has this name; data.eval has easy"
    text = "{data: {eval: a.jsonl}, rewards: {eval_functions: {easy: last_number}}}"
    assert "the set of data.eval has none: write {NAME: SOURCE}" in error_of(text)


def test_sets_and_their_functions_in_all_forms_read_back(load: Load, tmp_path: Path):
    (tmp_path / "hard.jsonl").touch()
    (tmp_path / "mine.py").touch()
    config = load(
        """
        data:
          eval:
            easy: easy.jsonl
            both: [a.jsonl, b.jsonl]
            hard: {source: hard.jsonl, prompt_column: question, subset: 007, rows: 3, options: {n: 1}}
        rewards:
          functions: last_integer
          eval_functions:
            easy: last_number
            both: [last_number, {function: "mine.py:f", weight: 0.5}]
            hard: {function: reasoning_gym_score, kwargs: {}}
        """
    )
    assert isinstance(config.data.eval, dict)
    hard = config.data.eval["hard"]
    assert isinstance(hard, EvalSet) and hard == EvalSet(
        source=str(tmp_path / "hard.jsonl"), prompt_column="question", subset="007", rows=3, options={"n": 1}
    ), "found beside the run file"
    assert config.rewards.eval_functions == {
        "easy": ["last_number"],
        "both": ["last_number", RewardFunction(function=f"{tmp_path / 'mine.py'}:f", weight=0.5)],
        "hard": [RewardFunction(function="reasoning_gym_score", kwargs={})],
    }
    again = load(dump_config(config))
    assert again.data == config.data and again.rewards == config.rewards
    data = config.data.of_eval_set(hard)
    assert (data.prompt_column, data.subset, data.eval_rows, data.eval_split) == ("question", "007", 3, "test")


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path):
    values = yaml.safe_load(dump_config(GRPOConfig(eval_samples=4)))
    del values["data"]["eval_samples"]
    values["logging"] |= {"num_generations_eval": 4, "working_dir": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml").data.eval_samples == 4


def test_the_files_of_a_saved_run_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project = tmp_path / "project"
    (project / "main").mkdir(parents=True)
    for name in ("hard.jsonl", "mine.py"):
        (project / name).touch()
    monkeypatch.chdir(project)
    config = GRPOConfig(
        data={"eval": {"hard": {"source": "hard.jsonl", "subset": "main"}}},
        rewards={"eval_functions": {"hard": "mine.py:f"}},
        logging={"working_dir": project},
    )
    (project / "config.yaml").write_text(dump_config(config))
    monkeypatch.chdir(tmp_path)
    found = load_config(project / "config.yaml")
    assert isinstance(found.data.eval, dict)
    hard = found.data.eval["hard"]
    assert isinstance(hard, EvalSet) and hard.source == str(project / "hard.jsonl") and hard.subset == "main"
    assert found.rewards.eval_functions == {"hard": [f"{project / 'mine.py'}:f"]}
