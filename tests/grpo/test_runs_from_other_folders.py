"""A run that was started in one folder, with relative paths, is evaluated, exported and scored from any other one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from stock_adapters import save_stock_adapter
from tiny_runs import ROWS

from rankup.grpo.cli.main import main
from rankup.grpo.config import load_config
from rankup.grpo.config.run_folders import function_of_run
from rankup.grpo.run.records import read_summary

REWARD = """def score(completion_ids, **kwargs):
    return [sum(token < {} for token in ids) / len(ids) for ids in completion_ids]
"""
RUN_FILE = {
    "model": {"name": "models/tiny", "tokenizer": "models/tokenizer", "dtype": "float32"},
    "lora": {"start_from": "models/sft"},
    "rollout": {"engine": "torch", "num_generations": 4, "max_prompt_length": 64, "max_completion_length": 8},
    "optim": {"prompts_per_step": 3, "max_steps": 1},
    "data": {"train": "rows.jsonl", "eval": {"all": "rows.jsonl", "same": "make.py:rows"}},
    "rewards": {"functions": ["reward.py:score", {"function": "own_package.module:score", "kwargs": None, "weight": 0.5}]},
    "logging": {"run_name": "mine", "completions_steps": 1},
}


def write_inputs(folder: Path, *, rows: list[dict], threshold: int) -> None:
    (folder / "own_package").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "make.py").write_text(f"def rows():\n    return {rows}\n")
    (folder / "reward.py").write_text(REWARD.format(threshold))
    (folder / "own_package" / "module.py").write_text(REWARD.format(threshold))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN_FILE))


@pytest.fixture
def project(tiny_model_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a finished run; and the working directory is another folder, with other files of the same names."""
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        monkeypatch.delitem(sys.modules, name)
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    write_inputs(folder, rows=ROWS, threshold=130)
    shutil.copytree(tiny_model_path("llama"), folder / "models" / "tiny")
    shutil.copytree(tiny_model_path("llama"), folder / "models" / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    save_stock_adapter(folder / "models" / "tiny", folder / "models" / "sft", target_modules=["q_proj", "v_proj"])
    monkeypatch.chdir(folder)
    assert main(["train", "run.yaml"]) == 0
    write_inputs(elsewhere, rows=[{"prompt": "another"}], threshold=3)
    shutil.copytree(tiny_model_path("llama64"), elsewhere / "models" / "tiny")
    monkeypatch.chdir(elsewhere)
    return folder


def test_eval_export_and_reward_use_the_files_of_the_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = project / "runs" / "mine"
    after = (read_summary(run) or {})["evaluation"]["after"]["reward"]
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"adapter: {2 * len(ROWS)} prompts, greedy" in output and f"{after:.3f} [" in output
    assert main(["export", str(run), "--merge", "--output", "merged"]) == 0
    assert json.loads(Path("merged/config.json").read_text())["hidden_size"] == 96
    assert main(["export", str(run / "checkpoints" / "step_000001"), "--output", "adapter"]) == 0


@pytest.mark.parametrize("function", ["reward.py:score", "own_package.module:score", "own_package/module.py:score"])
@pytest.mark.parametrize("data", [".", "completions", "completions/step_000001.parquet"])
def test_reward_finds_functions_by_their_names_in_the_run_file(
    project: Path, capsys: pytest.CaptureFixture[str], function: str, data: str
) -> None:
    Path("reward.py").unlink()
    shutil.rmtree("own_package")
    capsys.readouterr()
    assert main(["reward", function, "--data", str(project / "runs" / "mine" / data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differ_from_recorded"] == 0


def test_a_name_that_two_functions_of_a_run_have_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    functions = ["/project/a/reward.py:score", "/project/b/reward.py:score", "/project/my_reward.py:score"]
    with pytest.raises(ValueError, match=r"^reward.py:score: the run has /project/a/reward.py:score and /project/b/"):
        function_of_run("reward.py:score", functions)
    assert function_of_run("b/reward.py:score", functions) == functions[1]
    assert function_of_run("no.py:score", functions) == "no.py:score"
    assert function_of_run("json.decoder:score", ["/project/json/decoder.py:score"]) == "json.decoder:score"


def test_a_project_that_was_moved_with_its_runs(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project.rename(tmp_path / "moved")
    config = load_config(tmp_path / "moved" / "runs" / "mine" / "config.yaml")
    moved = tmp_path / "moved"
    assert (config.data.train, config.model.name) == (str(moved / "rows.jsonl"), str(moved / "models" / "tiny"))
    assert main(["eval", str(moved / "runs" / "mine")]) == 0


def test_a_run_folder_that_was_copied_finds_the_files_where_they_were(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "runs", tmp_path / "copies" / "runs")
    config = load_config(tmp_path / "copies" / "runs" / "mine" / "config.yaml")
    assert config.data.train == str(project / "rows.jsonl")
    assert config.lora.start_from == str(project / "models" / "sft")
    names = [entry.function for entry in config.rewards.entries()]
    assert names == [f"{project / 'reward.py'}:score", f"{project / 'own_package' / 'module.py'}:score"]


def test_a_copied_run_folder_in_the_working_directory(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(project / "runs", tmp_path / "copies" / "runs")
    shutil.copyfile(project / "rows.jsonl", tmp_path / "copies" / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "copies")
    config = load_config("runs/mine/config.yaml")
    assert (config.data.train, config.lora.start_from) == ("rows.jsonl", str(project / "models" / "sft"))


def test_overrides_are_from_the_working_directory(project: Path) -> None:
    file = project / "runs" / "mine" / "config.yaml"
    config = load_config(file, ["data.train=rows.jsonl"])
    assert config.data.train == "rows.jsonl" and config.logging.working_dir is None


def test_nothing_changes_in_the_folder_of_the_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    config = load_config("runs/mine/config.yaml")
    assert (config.data.train, config.model.name, config.lora.start_from) == ("rows.jsonl", "models/tiny", "models/sft")
    assert main(["train", "run.yaml", "--resume", "optim.max_steps=2", "--allow-changes"]) == 0


def test_a_run_file_elsewhere_names_models_beside_it(project: Path) -> None:
    shutil.rmtree("models")
    config = load_config(project / "run.yaml")
    models = project / "models"
    assert (config.model.name, config.model.tokenizer) == (str(models / "tiny"), str(models / "tokenizer"))
    assert config.lora.start_from == str(models / "sft")
