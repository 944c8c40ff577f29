"""Hashes of the code of a user's functions, for a resumed run to compare."""

import functools
import inspect
import json
import linecache
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from scored import scorer_of

from rankup.grpo.checkpoint.resume import input_changes
from rankup.grpo.experience.user_functions import CODE
from rankup.rewards.answers import exact_match_of
from rankup.rewards.loading import load_object
from rankup.rewards.own_code import code_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.py").write_text("def f(completions):\n    from utils import x\n    return [x]\n")
    (tmp_path / "mine" / "utils.py").write_text("x = 1.0\n")
    (tmp_path / "mine" / "unused.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_and_its_neighbours_are_compared(folder: Path):
    before = code_of("mine/a.py:f")
    assert set(before) == {"mine/a.py", "mine/utils.py"}
    assert code_of(f"{folder}/mine/a.py:f") == code_of(load_object("mine/a.py:f")) == before  # pyright: ignore[reportArgumentType]
    (folder / "mine" / "unused.py").write_text("changed = True\n")
    assert code_of("mine/a.py:f") == before
    (folder / "mine" / "utils.py").write_text("x = 2.0\n")
    after = code_of("mine/a.py:f")
    (change,) = input_changes({CODE: before}, {CODE: after})
    assert str(change).startswith("code of functions.mine/utils.py: ") and change.affects_training


def test_a_module_of_the_working_directory_is_compared(folder: Path):
    assert set(code_of("mine.a:f")) == {"mine/a.py"}  # its neighbours are those of the working directory
    assert scorer_of("mine.a:f").code == code_of("mine.a:f")


def test_of_a_function_that_is_passed_in_python_its_own_text_is_compared():
    def mine(completions, **kwargs):
        return [1.0] * len(completions)

    class Scores:
        def __call__(self, completions, **kwargs):
            return [1.0] * len(completions)

    assert set(code_of(mine)) == {"mine"} and code_of(mine) == code_of(functools.partial(mine))
    assert set(code_of(Scores())) == {"Scores"}
    same = inspect.getsource(mine)
    assert same and code_of(len) == {} and code_of(exact_match_of()) == {}


@pytest.mark.parametrize(
    "spec", ["last_integer", "trl.rewards:think_format_reward", "rankup.rewards.answers:last_number", "math:gcd"]
)
def test_installed_functions_are_not_compared(spec: str):
    assert code_of(spec) == {}


def test_a_checkpoint_of_an_earlier_version_has_no_code():
    assert list(input_changes({"reward functions": ["f"]}, {"reward functions": ["f"], CODE: {"a.py": "1"}})) == []
    assert len(list(input_changes({CODE: {}}, {CODE: {"a.py": "1"}}))) == 2


SENDS_A_CLASS = """
import functools, json, sys
from ray import cloudpickle
from rankup.rewards.own_code import code_of

def decorated(cls):
    return cls

class Other:
    def reset(self):
        return "other"

@decorated
class Mine:
    size = 1

    def reset(self):
        return "mine"

open("sent", "wb").write(cloudpickle.dumps(Mine))
print(json.dumps(code_of(Mine)))
"""


def test_a_class_of_a_script_has_the_same_hash_in_a_worker_whose_main_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def sent() -> tuple[dict[str, str], dict[str, str]]:
        """The hashes in the script, and here."""
        result = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=True)
        linecache.clearcache()
        return json.loads(result.stdout), code_of(pickle.loads(Path("sent").read_bytes()))

    Path("script.py").write_text(SENDS_A_CLASS)
    there, here = sent()
    assert there == here and set(here) == {"Mine"}
    Path("script.py").write_text(SENDS_A_CLASS.replace("size = 1", "size = 2"))
    assert sent()[1] != here
