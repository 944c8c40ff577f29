"""The examples in the docstrings of `rewards` and in docs/rewards.md work, and give what their comments say."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scored import inputs, length

from rankup.configs import quickstart
from rankup.grpo.config import GRPOConfig
from rankup.rewards.runner import Scorer
from rankup.rewards.sandbox import bubblewrap_problem

REWARDS = Path(__file__).resolve().parents[2] / "rewards"
PAGE = REWARDS.parent / "docs" / "rewards.md"
NOT_RUN = {
    "worker": "a command line",
    "sandbox_launcher": "a command line",
    "ray_connection": "needs a Ray cluster",
    "ray_pool": "needs a Ray cluster",
    "judge_endpoint": "needs an endpoint",
}
NEEDS_BUBBLEWRAP = pytest.mark.skipif(bubblewrap_problem() is not None, reason="no bubblewrap")
RUN_FILE = ("rewards:", "data:")
FILES = {
    "my.py": "def length(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n",
    "rewards/math.py": "def correct(completions, **kwargs):\n    return [1.0] * len(completions)\n",
    "lengths.py": "def target(tokens):\n    return lambda completions, **kwargs: [float(tokens)] * len(completions)\n",
}


def examples_of(docstring: str) -> Iterator[str]:
    """The indented blocks of a docstring; a run file, and Python behind it, are two."""
    for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", docstring, re.MULTILINE):
        example = textwrap.dedent(block)
        while example.startswith(RUN_FILE):
            run_file, _, example = example.partition("\n\n")
            yield run_file
        if example:
            yield example


def module_examples(*, yaml_files: bool) -> list[Any]:
    """Name and text of each example of the modules' docstrings, as parameters of a test."""
    found = []
    for file in sorted(REWARDS.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text()), clean=False) or ""
        for example in examples_of(docstring + "\n"):
            if example.startswith(RUN_FILE) == yaml_files and file.stem not in NOT_RUN:
                marks = [NEEDS_BUBBLEWRAP] if file.stem in ("sandbox", "code") else []
                found.append(pytest.param(file.stem, example, id=file.stem, marks=marks))
    return found


def run(code: str, names: dict[str, Any]) -> None:
    """Execute statements; an expression must have the value of the comment behind it, if that is a literal."""
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), "example", "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), "example", "eval"), names)
        comment = lines[statement.lineno - 1].partition("  # ")[2].partition(";")[0].strip()
        try:
            expected = ast.literal_eval(comment)
        except (SyntaxError, ValueError):
            continue
        assert value == expected, f"{lines[statement.lineno - 1]}: {value!r}"


@pytest.mark.parametrize(("module", "code"), module_examples(yaml_files=False))
def test_a_module_s_example_returns_the_values_in_its_comments(module, code, tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    name = "rankup.rewards" if module == "__init__" else f"rankup.rewards.{module}"
    names = {"length": length, "my_function": length, "inputs": inputs("abc", "abcde"), "pickle": pickle}
    for imported in ("rankup.rewards", "rankup.rewards.portable", "rankup.rewards.contract"):
        names |= vars(importlib.import_module(imported))
    names |= vars(importlib.import_module(name))
    run(code, names)


@pytest.mark.parametrize(("module", "text"), module_examples(yaml_files=True))
def test_a_module_s_run_file_is_valid_and_its_functions_exist(module, text):
    rewards = GRPOConfig(**yaml.safe_load(text)).rewards
    assert Scorer(rewards).names


def test_few_examples_are_not_run():
    assert set(NOT_RUN) <= {file.stem for file in REWARDS.glob("*.py")}
    assert len(module_examples(yaml_files=False)) >= 12 and len(module_examples(yaml_files=True)) >= 8


def test_the_page_s_function_that_checks_rows():
    [code] = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "with_check" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    scorer = Scorer(GRPOConfig().rewards, names["graded"])
    assert scorer.score(inputs("abcd", level=[2])).total == [2.0]
    scorer.check_row({"level": 2})
    with pytest.raises(ValueError, match="reward function 'graded' cannot use it: level 4 does not exist"):
        scorer.check_row({"level": 4})


def test_the_page_s_function_scores_completions_of_the_quick_start():
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    row = quickstart.evaluation()[0]
    texts = [f"The sum is {row['answer']}.", row["answer"], f"{row['answer']}1", "I do not know", ""]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (conversations, texts):  # of a conversation, and of a prompt that is a text
        for answer in (row["answer"], int(row["answer"])):
            given = inputs(*completions, answer=[answer] * 5)
            assert Scorer(GRPOConfig().rewards, names["score"]).score(given).total == [1.0, 1.0, 0.0, 0.0, 0.0]
