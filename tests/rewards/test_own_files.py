"""Files of users that import each other: in folders of their own, inside functions, in every kind of process."""

import functools
import json
import sys
import types
from pathlib import Path

import pytest
from scored import inputs, scorer_of

from rankup.rewards.contract import Interruption
from rankup.rewards.loading import load_object, load_reward, spec_of
from rankup.rewards.own_files import files_of

LAZY = "def {name}(completions, **kwargs):\n    from utils import value\n    return [value] * len(completions)\n"
EAGER = "import utils\ndef {name}(completions, **kwargs):\n    return [utils.value] * len(completions)\n"


def write(folder: Path, **files: str) -> Path:
    """Files of a folder, by their names without .py; `tools__a` is tools/a.py, and `tools__` is tools/__init__.py."""
    for name, text in files.items():
        inside, separator, last = name.partition("__")
        path = folder / f"{inside}{'/' if separator else ''}{last or ('__init__' if separator else '')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def two_folders(tmp_path: Path) -> list[str]:
    """Functions of two folders: each has its own `utils`, imported at the top in one and inside the function in the other."""
    write(tmp_path / "a", utils="value = 1.0\n", reward=EAGER.format(name="eager"))
    write(tmp_path / "b", utils="value = 2.0\n", reward=LAZY.format(name="lazy"))
    return [f"{tmp_path}/a/reward.py:eager", f"{tmp_path}/b/reward.py:lazy"]


def test_each_folder_has_its_own_neighbours(two_folders: list[str]):
    assert scorer_of(two_folders).score(inputs("x")).by_function == {"eager": [1.0], "lazy": [2.0]}
    assert "utils" not in sys.modules


def test_each_folder_has_its_own_neighbours_in_a_process(make_scorer, two_folders: list[str]):
    assert make_scorer(two_folders).score(inputs("x")).by_function == {"eager": [1.0], "lazy": [2.0]}
    given = [load_reward(spec) for spec in two_folders]
    assert make_scorer([*given, functools.partial(given[1])]).score(inputs("x")).total == [5.0]


def test_a_neighbour_comes_before_a_module_that_is_loaded_or_on_the_path(tmp_path: Path, monkeypatch):
    write(tmp_path / "project", utils="value = 0.0\n")
    write(tmp_path / "rewards", utils="value = 3.0\n", reward=EAGER.format(name="f"))
    monkeypatch.syspath_prepend(tmp_path / "project")
    monkeypatch.setitem(sys.modules, "utils", types.ModuleType("utils"))
    assert load_reward(f"{tmp_path}/rewards/reward.py:f")(completions=["x"]) == [3.0]


def test_packages_submodules_and_relative_imports_next_to_a_file(tmp_path: Path):
    write(
        tmp_path,
        tools__="from tools.numbers import one\nfrom . import numbers\n",
        tools__numbers="import other\none, two = 1, other.two\n",
        plain__inner="three = 3\n",  # a folder without __init__.py
        other="two = 2\n",
        reward=(
            "import tools.numbers, tools.numbers as n\nfrom tools import one\n"
            "from .other import two\nfrom plain.inner import three\n"
            "values = [tools.numbers.one, n.two, one, two, three, tools.numbers is n]\n"
        ),
    )
    assert load_object(f"{tmp_path}/reward.py:values") == [1, 2, 1, 2, 3, True]


def test_a_file_that_is_called_like_a_library_imports_the_library(tmp_path: Path):
    write(tmp_path, yaml="import yaml\nparse = yaml.safe_load\n", rankup="", json="raise RuntimeError\n")
    assert load_object(f"{tmp_path}/yaml.py:parse")("[1]") == [1]  # pyright: ignore[reportCallIssue]
    write(tmp_path, reward="import json, rankup.section\nfrom rankup.rewards.texts import text_of\nhas = json.dumps\n")
    assert load_object(f"{tmp_path}/reward.py:has") is json.dumps


def test_files_of_a_folder_share_a_neighbour(tmp_path: Path):
    write(
        tmp_path,
        utils="state = []\n",
        a="from utils import state\n",
        b="import a\nfrom utils import state\nsame = a.state is state\n",
    )
    assert load_object(f"{tmp_path}/b.py:same") is True
    assert load_object(f"{tmp_path}/a.py:state") is load_object(f"{tmp_path}/b.py:state")


def test_an_edited_neighbour_is_imported_again(tmp_path: Path):
    write(tmp_path, utils="value = 1.0\n", reward=EAGER.format(name="f"))
    spec = f"{tmp_path}/reward.py:f"
    before = load_reward(spec)
    assert load_reward(spec) is before
    write(tmp_path, utils="value = 1.5\n")
    assert load_reward(spec)(completions=["x"]) == [1.5]
    assert before(completions=["x"]) == [1.0]


def test_a_module_of_the_working_directory_finds_its_neighbours_inside_functions(make_scorer, tmp_path: Path, monkeypatch):
    write(tmp_path, mine__="", mine__rewards=LAZY.format(name="f"), utils="value = 4.0\n")
    monkeypatch.chdir(tmp_path)
    function = load_reward("mine.rewards:f")
    assert function(completions=["x"]) == [4.0]
    assert spec_of(function) == "mine.rewards:f"
    assert make_scorer("mine.rewards:f").score(inputs("x")).total == [4.0]


PARSES = """
import argparse, sys
options = argparse.ArgumentParser()
options.add_argument("--scale", type=float, default=2.0)
scale = options.parse_args().scale
arguments = list(sys.argv)
if __name__ == "__main__":
    raise RuntimeError("this is no script")
def f(completions, **kwargs):
    return [scale] * len(completions)
"""


def test_argparse_at_the_top_of_a_file_reads_no_arguments_of_ours(make_scorer, tmp_path: Path, monkeypatch):
    write(tmp_path, reward=PARSES)
    monkeypatch.setattr(sys, "argv", ["rankup", "train", "run.yaml", "--resume"])
    assert scorer_of(f"{tmp_path}/reward.py:f").score(inputs("x")).total == [2.0]
    assert load_object(f"{tmp_path}/reward.py:arguments") == [f"{tmp_path}/reward.py"]
    assert sys.argv == ["rankup", "train", "run.yaml", "--resume"]
    assert make_scorer(f"{tmp_path}/reward.py:f").score(inputs("x")).total == [2.0]


@pytest.mark.parametrize("line", ["sys.exit()", "exit(0)", "raise SystemExit('bye')", "raise BaseException('x')"])
@pytest.mark.parametrize("name", ["reward", "utils"])
def test_a_file_that_exits_while_it_is_imported_is_an_error(tmp_path: Path, line: str, name: str):
    write(tmp_path, **{"utils": "", "reward": "import utils\n", name: f"import sys\n{line}\n"})
    with pytest.raises(ValueError, match=r"reward\.py could not be imported: (SystemExit|BaseException)"):
        load_object(f"{tmp_path}/reward.py:f")


def test_ctrl_c_while_a_file_is_imported_stays_ctrl_c(tmp_path: Path):
    write(tmp_path, reward="raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_object(f"{tmp_path}/reward.py:f")


@pytest.mark.parametrize("code", ["raise Interruption(143)\n", "def f():\n    raise Interruption(143)\n"])
def test_a_signal_while_a_file_is_imported_or_a_factory_runs_stays_one(tmp_path: Path, code: str):
    write(tmp_path, reward=f"from rankup.rewards.contract import Interruption\n{code}")
    with pytest.raises(Interruption):
        load_reward(f"{tmp_path}/reward.py:f", kwargs={})


def test_the_files_of_a_function_are_those_that_it_imports(tmp_path: Path):
    write(
        tmp_path,
        reward="import json, numpy, tools.a\ndef f():\n    from utils import x\n",
        utils="from .deep import y\n",
        deep="y = 1\n",
        tools__="",
        tools__a="import utils\n",
        json="shadowed = True\n",
        unrelated="",
    )
    files = files_of(tmp_path / "reward.py")
    assert list(files) == ["deep.py", "reward.py", "tools/__init__.py", "tools/a.py", "utils.py"]
    assert files["deep.py"] == b"y = 1\n"


def test_a_changed_neighbour_fails_the_calls_of_a_new_process(make_scorer, tmp_path: Path):
    write(tmp_path, utils="value = 1.0\n", reward=EAGER.format(name="f"))
    scorer = make_scorer(f"{tmp_path}/reward.py:f", num_workers=1, on_error="none")
    assert scorer.score(inputs("x")).total == [1.0]
    scorer.close()
    write(tmp_path, utils="value = 2.0\n")
    assert "utils.py has changed since the run began" in str(scorer.score(inputs("x")).errors)
