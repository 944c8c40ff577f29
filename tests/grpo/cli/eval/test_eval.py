"""`rankup eval` of a run, its checkpoints, an adapter and models, and `rankup compare` of what they wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ROWS, metrics_of

from rankup.grpo.cli.eval.target import find_target
from rankup.grpo.cli.main import main
from rankup.grpo.run.evaluation_files import read_evaluation

pytestmark = pytest.mark.slow

REWARD = '''
def vowels(completions, completion_ids, log_extra, **kwargs):
    """Passes for the rare letters; the answer is the first character."""
    log_extra("extracted_answer", [text[:1] or None for text in completions])
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def short(completions, **kwargs):
    return [float(len(text) < 9) for text in completions]
'''
OPTIONS = [
    "engine=torch", "dtype=float32", "rank=8", "max_prompt_length=64", "max_completion_length=8", "num_generations=4",
    "prompts_per_step=3", "learning_rate=0.01", "eval_pass_reward=0.5",
]  # fmt: skip
SETS = ["--data", "easy=easy.jsonl", "--data", "hard=hard.jsonl"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tiny_model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run of two steps, which has a checkpoint of each."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mine.py").write_text(REWARD)
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "easy.jsonl", ROWS[:3])
    write_rows(folder / "hard.jsonl", ROWS[3:5])
    (folder / "run.yaml").write_text(
        f"model: {{name: {tiny_model_path('llama')}}}\n"
        "data: {train: rows.jsonl, eval: rows.jsonl, eval_rows: 4}\nrewards: {functions: mine.py:vowels}\n"
    )
    options = [*OPTIONS, "max_steps=2", "eval_steps=1", "save_steps=1", "eval_samples=3", "guards.enabled=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml", *options]) == 0
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    folder = shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def rankup(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; what it printed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run


def test_a_run_leaves_the_results_of_its_evaluations(project: Path) -> None:
    folder = project / "runs" / "run" / "evaluations"
    names = ["step_000000.json", "step_000001.json", "step_000002_after.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    rows = {row["step"]: row for row in metrics_of(project / "runs" / "run") if "eval_reward" in row}
    for step, when in enumerate(("before", "during", "after")):
        record = read_evaluation(folder / names[step])
        assert record.about["step"] == step and record.about["when"] == when
        assert record.metrics == {name: value for name, value in rows[step].items() if name != "step"}
        assert [len(one.rewards) for one in record.prompts] == [len(one.texts) for one in record.prompts] == [3] * 4
        assert list(record.all.estimates) == ["reward", "pass@1", "pass@2", "pass@3", "maj@3"]
        assert all(one.answers == [text[:1] or None for text in one.texts] for one in record.prompts)
        assert record.settings["sampling"]["num_generations"] == 3 and record.settings["pass_reward"] == 0.5


def test_eval_of_a_run_repeats_its_last_evaluation(project: Path, rankup: Callable[..., str]) -> None:
    output = rankup("eval", "runs/run")
    file = project / "runs" / "run" / "evaluations" / "eval_adapter_3_at_1.json"
    assert f"results: {file.relative_to(project)}" in output
    again, last = read_evaluation(file), read_evaluation(file.with_name("step_000002_after.json"))
    assert [one.texts for one in again.prompts] == [one.texts for one in last.prompts] and again.all == last.all
    reward = again.all.estimates["reward"]
    assert f"reward   {reward.mean:.3f} [{reward.low:.3f}, {reward.high:.3f}]" in output
    assert "adapter: 4 prompts, 3 completions each at temperature 1" in output
    rankup("eval", "runs/run")
    assert file.with_stem("eval_adapter_3_at_1_2").is_file(), "results are not replaced"


def test_eval_needs_no_training_data(project: Path, rankup: Callable[..., str]) -> None:
    assert "3 prompts" in rankup("eval", "runs/run", "data.train=gone.jsonl", "--rows", "3")


@pytest.mark.parametrize("how", ["--checkpoint", "folder"])
def test_eval_of_a_checkpoint_repeats_the_evaluation_at_its_step(project: Path, rankup: Callable[..., str], how: str) -> None:
    checkpoint = ["runs/run", "--checkpoint", "1"] if how == "--checkpoint" else ["runs/run/checkpoints/step_000001"]
    rankup("eval", *checkpoint)
    folder = project / "runs" / "run" / "evaluations"
    again, then = (read_evaluation(folder / name) for name in ("eval_step_000001_3_at_1.json", "step_000001.json"))
    assert [one.texts for one in again.prompts] == [one.texts for one in then.prompts]
    assert [one.texts for one in then.prompts] != [
        one.texts for one in read_evaluation(folder / "step_000002_after.json").prompts
    ]


def test_the_best_and_the_last_checkpoint(project: Path) -> None:
    checkpoints = project / "runs" / "run" / "checkpoints"
    rewards = {path.name: json.loads((path / "manifest.json").read_text())["reward"] for path in checkpoints.glob("step_*")}
    assert set(rewards) == {"step_000001", "step_000002"}
    assert rewards["step_000001"] is not None and rewards["step_000002"] is None, "evaluated after its checkpoint"
    assert find_target("runs/run", checkpoint="best").label == "step_000001"
    assert find_target("runs/run", checkpoint="last").label == "step_000002"
    for which, message in (("7", "no checkpoint of step 7: there are 1, 2"), ("newest", "must be best, last or a number")):
        with pytest.raises(ValueError, match=message):
            find_target("runs/run", checkpoint=which)
    shutil.rmtree(project / "runs" / "run" / "adapter")
    with pytest.raises(ValueError, match=r"no adapter in .*; --checkpoint last evaluates its newest checkpoint"):
        find_target("runs/run")


def test_eval_of_an_adapter_and_of_its_merged_model(project: Path, rankup: Callable[..., str]) -> None:
    """Two named sets, one with a function of its own; the adapter on its base model, the merged model, and the base model."""
    rankup("export", "runs/run", "--merge", "--dtype", "float32", "--output", "merged")
    rewards = ["--reward", "easy=mine.py:vowels", "--reward", "hard=mine.py:short", "--samples", "2"]
    same = [*SETS, *rewards, "--temperature", "0.9", "--top-p", "0.9", "--max-completion-length", "6"]
    same += [option for option in OPTIONS if not option.startswith("max_completion_length")]
    first = rankup("eval", "runs/run/adapter", *same, "--output", "adapter.json")
    assert "runs/run/adapter: 5 prompts, 2 completions each at temperature 0.9, top_p 0.9" in first
    rankup("eval", "merged", *same, "--output", "merged.json")
    base = json.loads((project / "runs" / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    rankup("eval", base, *same, "--output", "base.json")
    adapter, merged, untrained = (read_evaluation(Path(f"{name}.json")) for name in ("adapter", "merged", "base"))
    assert [one.texts for one in adapter.prompts] == [one.texts for one in merged.prompts]
    assert [one.texts for one in adapter.prompts] != [one.texts for one in untrained.prompts]
    assert list(adapter.sets["easy"].functions) == ["vowels"] and list(adapter.sets["hard"].functions) == ["short"]
    assert "eval_hard_rewards/vowels/mean" not in adapter.metrics and "maj@2" not in adapter.all.estimates
    assert "maj@2" in adapter.sets["easy"].estimates
    assert adapter.settings["sampling"]["max_completion_length"] == 6

    output = rankup("compare", "base.json", "adapter.json", "--all", "--json", "difference.json")
    values = json.loads(Path("difference.json").read_text())
    won, lost = len(values["won"]), len(values["lost"])
    assert f"won {won}, lost {lost}, equal {values['equal']}" in output and won + lost + values["equal"] == 5
    assert "5 prompts in both\n" in output and "settings that differ" not in output
    means = [one.all.estimates["reward"].mean for one in (untrained, adapter)]
    assert values["all"]["reward"]["difference"]["mean"] == pytest.approx(means[1] - means[0])
    assert list(values["sets"]) == ["easy", "hard"] and list(values["sets"]["hard"]) == ["reward", "pass@1", "pass@2"]


def test_compare_of_runs_and_checkpoints(project: Path, rankup: Callable[..., str]) -> None:
    output = rankup("compare", "runs/run/checkpoints/step_000001", "runs/run")
    folder = "runs/run/evaluations"
    assert output.startswith(
        f"A: {project / folder / 'step_000001.json'}\nB: {folder}/step_000002_after.json\n4 prompts in both\n"
    )
    rankup("eval", "runs/run", "--rows", "2", "data.eval_samples=1", "data.eval_temperature=0", "--output", "few.json")
    output = rankup("compare", "few.json", "runs/run")
    assert "2 prompts in both, 2 only in B" in output
    assert "settings that differ: sampling.num_generations 1, 3; sampling.temperature 0.0, 1.0" in output


def test_eval_of_a_run_file_evaluates_what_training_starts_from(project: Path, rankup: Callable[..., str]) -> None:
    output = rankup("eval", "run.yaml", *OPTIONS, "--output", "start.json")
    before = read_evaluation(project / "runs" / "run" / "evaluations" / "step_000000.json")
    assert "run.yaml: 4 prompts, greedy" in output
    assert [one.hash for one in read_evaluation(Path("start.json")).prompts] == [one.hash for one in before.prompts]
    assert not (project / "runs" / "run" / "evaluations" / "start.json").exists()


def test_gsm8k_and_reasoning_gym_with_the_right_reward_each(project: Path, rankup: Callable[..., str]) -> None:
    """A local folder in the form of the one on the Hub, and a generated task, each with its own prompt column and function."""
    (project / "gsm8k" / "main").mkdir(parents=True)
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(3)]
    write_rows(project / "gsm8k" / "test.jsonl", rows)
    base = json.loads((project / "runs" / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    output = rankup(
        "eval", base, "--data", "gsm8k=gsm8k", "--data", "sums=reasoning_gym:chain_sum", "--reward", "gsm8k=last_number",
        "--reward", "sums={function: reasoning_gym_score, kwargs: {}}", "--rows", "2", "data.eval.gsm8k.prompt_column=question",
        "data.eval.sums.options={size: 4}", *OPTIONS, "rollout.max_prompt_length=256", "--output", "both.json",
    )  # fmt: skip
    record = read_evaluation(Path("both.json"))
    assert {name: one.prompts for name, one in record.sets.items()} == {"gsm8k": 2, "sums": 2} and "gsm8k" in output
    assert list(record.sets["gsm8k"].functions) == ["last_number"]
    assert list(record.sets["sums"].functions) == ["reasoning_gym_score"]
    assert record.prompts[0].prompt == "What is 0 + 1?" and record.prompts[0].answers is not None
