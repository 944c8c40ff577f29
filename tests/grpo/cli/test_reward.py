"""`rankup new reward` and `rankup reward`, run as commands on real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankup.grpo.cli.main import main
from rankup.grpo.run.records import RunRecorder

CONVERSATION = [{"role": "user", "content": "2 + 2?"}]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that saved two groups of two: one prompt is a text, one a conversation; `answer` comes from the data."""
    recorder = RunRecorder(tmp_path / "run", config_yaml="")
    table = {
        "prompt": ["1 + 1 =", "1 + 1 =", CONVERSATION, CONVERSATION],
        "completion": ["2", "3", "It is 4.", "Four"],
        "completion_ids": [[1], [2], [1, 2, 3], [4]],
        "reward": [1.0, 0.0, 1.0, 0.0],
    }
    recorder.completions(
        1,
        table,
        rewards={"last_integer": [1.0, 0.0, 1.0, 0.5], "reward": [1.0] * 4},
        data={"answer": [2, 2, 4, 4], "reward": ["a"] * 4, "tests": [["1 == 1"]] * 4, "large": [2**70] * 4, "none": [None] * 4},
    )
    recorder.close()
    return recorder.output_dir


def test_a_new_reward_comes_with_a_test_that_passes(tmp_path, capsys):
    assert main(["new", "reward", "short_answers", "--dir", str(tmp_path / "mine")]) == 0
    printed = capsys.readouterr().out
    assert "short_answers.py:short_answers" in printed
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "mine")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout


def test_nothing_is_overwritten_and_a_name_must_be_one(tmp_path, capsys):
    (tmp_path / "test_mine.py").touch()
    assert main(["new", "reward", "mine", "--dir", str(tmp_path)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert not (tmp_path / "mine.py").exists()
    assert main(["new", "reward", "not-a-name", "--dir", str(tmp_path)]) == 1
    assert "'not-a-name' cannot be the name of a function" in capsys.readouterr().err


def tried(capsys, *arguments: str) -> dict:
    main(["reward", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_built_in_on_a_run_s_completions(run_folder, capsys):
    result = tried(capsys, "rankup.rewards.answers:last_integer", "--data", str(run_folder))
    assert [row["reward"] for row in result["rows"]] == [1.0, 0.0, 1.0, 0.0]
    assert (result["completions"], result["mean"], result["failed"], result["differ_from_recorded"]) == (4, 0.5, 0, 1)


@pytest.mark.parametrize("isolation", ["inline", "process", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_user_s_function_gets_the_same_arguments_as_in_a_run(run_folder, tmp_path, capsys, isolation):
    (tmp_path / "mine.py").write_text(
        "def sees(prompts, completions, completion_ids, answer, reward, **kwargs):\n"
        "    assert len(set(map(str, prompts))) == 1 and reward == ['a'] * 2 and 'last_integer' not in kwargs\n"
        "    return [10 * len(i) + isinstance(c, str) + a / 10 for c, i, a in zip(completions, completion_ids, answer)]\n"
    )
    result = tried(capsys, f"{tmp_path}/mine.py:sees", "--data", str(run_folder), "--isolation", isolation)
    assert [row["reward"] for row in result["rows"]] == pytest.approx([11.2, 11.2, 30.4, 10.4])
    assert result["rows"][2]["completion"] == [{"role": "assistant", "content": "It is 4."}]


def test_columns_are_restored_unchanged(run_folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def reward(answer, tests, large, none, **kwargs):\n"
        "    assert str(answer[0]) in ('2', '4') and tests[0] == ['1 == 1'] and large[0] == 2**70 and none[0] is None\n"
        "    return [1.0] * len(answer)\n"
    )
    result = tried(capsys, f"{tmp_path}/mine.py:reward", "--data", str(run_folder))
    assert result["failed"] == 0 and result["differ_from_recorded"] == 0, "not the run's sum, which is called reward too"


def test_a_factory_on_a_jsonl_file(tmp_path, capsys):
    factory = "def above(limit):\n    return lambda completions, **kw: [len(c) > limit for c in completions]\n"
    (tmp_path / "made.py").write_text(factory)
    (tmp_path / "rows.jsonl").write_text('{"completion": "long enough"}\n{"completion": "short"}\n')
    arguments = [f"{tmp_path}/made.py:above", "--kwargs", "{limit: 6}", "--data", str(tmp_path / "rows.jsonl")]
    assert [row["reward"] for row in tried(capsys, *arguments)["rows"]] == [1.0, 0.0]
    assert [row["reward"] for row in tried(capsys, *arguments, "--rows", "1")["rows"]] == [0.0]


def test_the_summary_and_examples_are_shown(run_folder, capsys):
    assert main(["reward", "rankup.rewards.answers:last_integer", "--data", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert "mean" in printed and "It is 4." in printed and "differ from recorded" in printed


def test_rewards_of_long_completions_are_shown(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"completion": "word " * 400 + str(n)}) + "\n" for n in range(3)))
    (tmp_path / "mine.py").write_text("def last_digit(completions, **kw): return [float(c[-1]) + 0.125 for c in completions]\n")
    assert main(["reward", f"{tmp_path}/mine.py:last_digit", "--data", str(tmp_path / "rows.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "word" in line] == [["2.12", "word"], ["1.12", "word"], ["0.125", "word"]]
    assert any(line.split() == ["reward", "completion"] for line in lines)


def test_a_completion_without_content_is_shown(tmp_path, capsys):
    """A tool call may have none."""
    row = {"prompt": CONVERSATION, "completion": [{"role": "assistant", "content": None}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "mine.py").write_text("def one(completions, **kw): return [1.0] * len(completions)\n")
    assert main(["reward", f"{tmp_path}/mine.py:one", "--data", str(tmp_path / "rows.jsonl")]) == 0
    assert "highest and lowest" in capsys.readouterr().out


def test_a_function_that_fails_is_shown_with_status_1(run_folder, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions, **kwargs):\n    raise KeyError('gold')\n")
    assert main(["reward", f"{tmp_path}/bad.py:bad", "--data", str(run_folder)]) == 1
    assert "KeyError: 'gold'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--data", "."], "has no saved completions"),
        (["--data", "rows.jsonl"], "no column `completion`"),
        (["--data", "rows.txt"], "cannot read"),
        (["--data", "good.jsonl"], "requires 'answer', which is not a column"),
        (["--data", "good.jsonl", "--kwargs", "3"], "--kwargs must be a mapping"),
        (["--data", "good.jsonl", "--rows", "0"], "--rows must be at least 1"),
        (["--data", "good.jsonl", "--timeout", "0"], "--timeout must be a positive number"),
    ],
)
def test_mistakes_give_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rows.txt").write_text("a\n")
    (tmp_path / "good.jsonl").write_text('{"completion": "a"}\n')
    assert main(["reward", "rankup.rewards.answers:last_integer", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_kwargs_read_as_run_files_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"completion": "a"}\n')
    (tmp_path / "penalty.py").write_text(
        "def penalty(max_penalty):\n    assert isinstance(max_penalty, float), max_penalty\n"
        "    return lambda completions, **kwargs: [max_penalty] * len(completions)\n"
    )
    for written, number in (("-5e-1", -0.5), ("1e-2", 0.01), ("2.5E+1", 25.0)):
        kwargs = f"{{max_penalty: {written}}}"
        arguments = ["reward", "penalty.py:penalty", "--kwargs", kwargs, "--data", "rows.jsonl", "--json"]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["mean"] == number
    assert main(["reward", "penalty.py:penalty", "--kwargs", "{max_penalty: [", "--data", "rows.jsonl"]) == 1
    assert "rankup: error: --kwargs must be a mapping, such as '{tokens: 100}': " in capsys.readouterr().err
