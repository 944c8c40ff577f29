"""`rankup new reward` and `rankup reward`, run as commands on real files."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from made_episodes import DIALOGUE, VOID, completion_of, group_of, played

from rankup.grpo.cli.main import main
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.experience.step_metrics import completions_table
from rankup.grpo.run.records import RunRecorder
from rankup.rewards.combining import Scores

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


def test_prompts_of_a_file_are_read_as_training_reads_them(tmp_path, capsys):
    written = {
        "[1, 2]": 0.0, '[{"a": 1}]': 0.0, '{"a": 1}': 0.0, '[{"role": "user", "content": "2 + 2?"}]': 1.0,
        "[{'role': 'user', 'content': '2 + 2?'}]": 1.0,
    }  # fmt: skip
    rows = [{"prompt": prompt, "completion": "4"} for prompt in written]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def is_messages(prompts, completions):\n"
        "    assert all(isinstance(p, str) == isinstance(c, str) for p, c in zip(prompts, completions))\n"
        "    return [not isinstance(p, str) for p in prompts]\n"
    )
    result = tried(capsys, f"{tmp_path}/mine.py:is_messages", "--data", str(tmp_path / "rows.jsonl"))
    assert [row["reward"] for row in result["rows"]] == list(written.values())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "{\\"role\\": \\"user\\", \\"content\\": \\"x\\"}", "completion": "4"}\n')
    assert main(["reward", f"{tmp_path}/mine.py:is_messages", "--data", str(tmp_path / "rows.jsonl")]) == 1
    assert "the prompt of row 0 is text that holds one message: put it into a list" in capsys.readouterr().err


def test_saved_prompts_stay_what_they_were(tmp_path, capsys):
    """Texts that look like JSON, beside conversations."""
    prompts = ["[1, 2]", '[{"a": 1}]', '"quoted"', CONVERSATION]
    recorder = RunRecorder(tmp_path / "run", config_yaml="")
    recorder.completions(1, {"prompt": prompts, "completion": ["x"] * 4}, rewards={}, data={"sent": list(map(repr, prompts))})
    recorder.close()
    (tmp_path / "mine.py").write_text("def same(prompts, sent):\n    return [repr(p) == s for p, s in zip(prompts, sent)]\n")
    result = tried(capsys, f"{tmp_path}/mine.py:same", "--data", str(tmp_path / "run"))
    assert [row["reward"] for row in result["rows"]] == [1.0] * 4


def test_a_factory_on_a_jsonl_file(tmp_path, capsys):
    factory = "def above(limit):\n    return lambda completions, **kw: [len(c) > limit for c in completions]\n"
    (tmp_path / "made.py").write_text(factory)
    (tmp_path / "rows.jsonl").write_text('{"completion": "long enough"}\n{"completion": "short"}\n')
    arguments = [f"{tmp_path}/made.py:above", "--kwargs", "{limit: 6}", "--data", str(tmp_path / "rows.jsonl")]
    assert [row["reward"] for row in tried(capsys, *arguments)["rows"]] == [1.0, 0.0]
    assert [row["reward"] for row in tried(capsys, *arguments, "--rows", "1")["rows"]] == [0.0]


SEEN_ROWS = b'{"prompt": "a", "completion": "b", "answer": "007"}\n{"completion": "c", "n": 1}'
WIDE = "prompt\tcompletion\tanswer\tn\na\tb\t007\t\n\tc\t\t1\n".encode("utf-16")
SEEN = """
from pathlib import Path

def see(prompts, completions, answer, **columns):
    with Path("seen.txt").open("a") as file:
        file.writelines(f"{row!r}\\n" for row in zip(prompts, completions, answer, columns["n"]))
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("rows.jsonl.gz", gzip.compress(SEEN_ROWS, mtime=0), ()),
        ("ROWS.JSONL", b"\xef\xbb\xbf" + SEEN_ROWS, ()),
        ("rows.json", b'[{"prompt": "a", "completion": "b", "answer": "007"},\n{"completion": "c", "n": 1}]', ()),
        ("rows.csv", b"prompt,completion,answer,n\na,b,007,\n,c,,1\n", ("--column-types", "{n: int}")),
        ("wide.tsv", WIDE, ("--column-types", "{n: int}", "--encoding", "utf-16")),
    ],
)
def test_a_file_is_read_as_in_training(tmp_path, monkeypatch, capsys, name, content, options):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    Path("mine.py").write_text(SEEN)
    assert tried(capsys, "mine.py:see", "--data", name, *options)["completions"] == 2
    assert Path("seen.txt").read_text().splitlines() == ["('a', 'b', '007', None)", "('', 'c', None, 1)"]


def test_a_saved_data_set_and_a_part_of_it_are_read(tmp_path, capsys):
    rows = [{"completion": str(n), "answer": n} for n in range(5)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    arguments = ["rankup.rewards.answers:last_integer", "--data", str(tmp_path / "saved")]
    assert tried(capsys, *arguments)["mean"] == 1.0
    assert tried(capsys, *arguments, "--split", "train[:2]")["completions"] == 2


def test_completions_of_one_prompt_are_told_from_those_whose_columns_are_only_equal(tmp_path, capsys):
    rows = [{"completion": "x", "answer": answer} for answer in (1, 1, 1.0, True, "1")]
    rows += [{"completion": "x", "answer": float("nan")}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def size(completions, **columns): return [float(len(completions))] * len(completions)\n")
    result = tried(capsys, f"{tmp_path}/mine.py:size", "--data", str(tmp_path / "rows.jsonl"))
    assert [row["reward"] for row in result["rows"]] == [2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0]


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
        (["--data", "rows.txt"], "cannot read completions from rows.txt: it has no column `completion` (columns: text)"),
        (["--data", "rows.xlsx"], "data files are .jsonl"),
        (["--data", "some.jsonl"], "row 1 of some.jsonl has no completion"),
        (["--data", "good.jsonl", "--split", "dev"], "good.jsonl has no split 'dev'"),
        (["--data", "good.jsonl", "--encoding", "latin-x"], "Python knows no encoding 'latin-x'"),
        (["--data", "good.jsonl", "--column-types", "{answer: num}"], "data.column_types.answer: must be 'str', 'int'"),
        (["--data", "good.jsonl", "--column-types", "int"], "--column-types must be a mapping"),
        (["--data", "good.jsonl", "--column-types", "{answer: int}"], "data.column_types: no column 'answer'"),
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
    (tmp_path / "rows.xlsx").write_text("a\n")
    (tmp_path / "some.jsonl").write_text('{"completion": "a"}\n{"prompt": "b"}\n')
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


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """A run that saved an episode that ends with a result, a void one, and one in a plain text."""
    scores = Scores(total=[1.0, None], by_function={}, extras={}, metrics={}, weights=[])
    ends_with_result = completion_of(played(messages=DIALOGUE[:2]), sampled=5, given=3, text="I add. 1036")
    groups = [group_of(ends_with_result, completion_of(VOID), scores=scores, advantages=(0.0, 0.0))]
    recorder = RunRecorder(tmp_path / "run", config_yaml="")
    table = completions_table(groups)
    recorder.completions(1, table.table, rewards={}, data={})
    text = dataclasses.replace(groups[0], prompt=Prompt(content="741 + 295 =", token_ids=(5,)))
    table = completions_table([text.select([0])])
    recorder.completions(2, table.table, rewards={}, data={})
    recorder.close()
    return recorder.output_dir


def test_functions_get_the_messages_of_saved_episodes_but_of_no_void_one(episodes, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def mine(completions, completion_ids, sampled_lengths, **kwargs):\n"
        "    assert [len(ids) for ids in completion_ids] == [8] and sampled_lengths == [5]\n"
        "    return [float(c[-1]['role'] == 'tool' and c[0]['tool_calls'][0]['function']['name'] == 'add')"
        " if isinstance(c, list) else 0.5 for c in completions]\n"
    )
    result = tried(capsys, f"{tmp_path}/mine.py:mine", "--data", str(episodes))
    assert [row["reward"] for row in result["rows"]] == [1.0, 0.5], result
    assert [row["completion"] for row in result["rows"]] == [list(DIALOGUE[:2]), "I add. 1036"]


def test_built_in_rewards_read_what_the_model_says_and_no_result(episodes, capsys):
    result = tried(capsys, "rankup.rewards.formats:matches", "--kwargs", "{pattern: 'I add.*'}", "--data", str(episodes))
    assert [row["reward"] for row in result["rows"]] == [1.0, 1.0]


def test_a_function_that_needs_instances_cannot_be_tried(episodes, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def mine(environments, **kwargs):\n    return [1.0]\n")
    assert main(["reward", f"{tmp_path}/mine.py:mine", "--data", str(episodes)]) == 1
    assert "requires `environments`: only a run with rollout.environment has them" in capsys.readouterr().err
