import functools
import pickle
import sys
from importlib.metadata import entry_points
from traceback import walk_tb

import pytest
from scored import scorer_of

from rankup.rewards.contract import Inputs
from rankup.rewards.loading import ENTRY_POINTS, load_object, load_reward, reward_name


def test_a_function_is_loaded_from_a_file(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def one(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    assert load_reward(f"{file}:one")(completions=["a", "b"]) == [1.0, 1.0]


def test_a_relative_path_is_looked_up_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here.py").write_text("place = 'here'\n")
    monkeypatch.chdir(tmp_path)
    assert load_object("here.py:place") == "here"
    with pytest.raises(FileNotFoundError, match=r"no file there\.py \(looked for .*/there\.py; names in a run file are"):
        load_object("there.py:place")


def test_two_files_of_one_name_do_not_clash(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(f"def f(**kwargs):\n    return {name!r}\n")
    functions = [load_reward(f"{tmp_path}/{name}/reward.py:f") for name in ("a", "b")]
    assert [f() for f in functions] == ["a", "b"]
    assert functions[0].__module__ != functions[1].__module__


def test_a_file_is_imported_once_until_it_is_edited(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("state = []\ndef f(): return state\n")
    assert load_reward(f"{file}:f")() is load_object(f"{file}:state")
    file.write_text("state = 'edited'\n")
    assert load_object(f"{file}:state") == "edited"


def test_dataclasses_and_pickle_work_in_a_file(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, KW_ONLY\n"
        "@dataclass\n"
        "class Grade:\n"
        "    value: float\n"
        "    _: KW_ONLY\n"
        "    note: str = ''\n"
        "grade = Grade(0.5)\n"
    )
    grade = load_object(f"{file}:grade")
    assert pickle.loads(pickle.dumps(grade)) == grade


def test_a_file_may_import_files_next_to_it_and_sys_path_is_restored(tmp_path, monkeypatch):
    (tmp_path / "helper_beside_reward.py").write_text("value = 7\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('hides the standard library')\n")
    (tmp_path / "reward.py").write_text("import json\nimport helper_beside_reward\ntext = json.dumps([1])\n")
    monkeypatch.delitem(sys.modules, "json")
    before = list(sys.path)
    assert load_object(f"{tmp_path}/reward.py:text") == "[1]"
    assert sys.path == before
    assert "helper_beside_reward" not in sys.modules


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_by_module_name.py").write_text("def f(): return 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("rewards_by_module_name:f")() == 3


@pytest.mark.parametrize("spec", ["accuracy", "some/model", "file.py:", ":f", "file.py:not a name", "file.py:1.0"])
def test_a_malformed_spec_says_how_to_write_it(spec):
    with pytest.raises(ValueError, match=r"write it as path/to/file\.py:name or package\.module:name"):
        load_object(spec)


def test_a_path_without_py_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"must end in \.py, as in rewards/mine\.py:f"):
        load_object("rewards/mine:f")


def test_a_missing_function_names_the_near_ones(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("from math import gcd\ndef correctness(): ...\ndef style(): ...\n")
    with pytest.raises(ValueError, match=r"has no 'corectness': did you mean correctness\?$"):
        load_object(f"{file}:corectness")
    with pytest.raises(ValueError, match=r"has no 'zzz': it has correctness, style$"):
        load_object(f"{file}:zzz")


def test_a_missing_module_is_distinguished_from_a_missing_import_inside_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^no module 'no_such_package\.rewards'"):
        load_object("no_such_package.rewards:f")
    (tmp_path / "imports_nothing_good.py").write_text("import no_such_package\n")
    with pytest.raises(
        ValueError, match=r"'imports_nothing_good' could not be imported: ModuleNotFoundError"
    ) as caught:
        load_object("imports_nothing_good:f")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [("x = 1\nx / 0\n", ZeroDivisionError, 2), ("import no_such_package\n", ModuleNotFoundError, 1)],
)
def test_an_error_inside_the_file_keeps_its_traceback(tmp_path, text, error, line):
    file = tmp_path / "reward.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"reward\.py could not be imported: {error.__name__}: ") as caught:
        load_object(f"{file}:f")
    cause = caught.value.__cause__
    assert cause is not None
    assert type(cause) is error
    places = [(frame.f_code.co_filename, number) for frame, number in walk_tb(cause.__traceback__)]
    assert (str(file), line) in places
    half_made = [module for module in sys.modules.values() if getattr(module, "__file__", None) == str(file)]
    assert not half_made


def test_a_syntax_error_is_one_line_with_its_place(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"reward\.py could not be imported: SyntaxError: .*line 1") as caught:
        load_object(f"{file}:f")
    assert "\n" not in str(caught.value)


def test_a_class_or_a_number_is_not_a_reward():
    with pytest.raises(ValueError, match="is a class: name an instance"):
        load_reward("collections:OrderedDict")
    with pytest.raises(ValueError, match="is not callable: it is a float"):
        load_reward("math:pi")


def test_a_callable_passes_through():
    assert load_reward(len) is len


def test_names_go_through_partials_and_to_the_class():
    class Judge:
        def __call__(self, completions):
            return [0.0]

    def correct(completions):
        return [1.0]

    assert reward_name(correct) == "correct"
    assert reward_name(functools.partial(functools.partial(correct), completions=[])) == "correct"
    assert reward_name(Judge()) == "Judge"
    assert reward_name(functools.partial(Judge())) == "Judge"


# Short names, factories, classifiers


def test_every_built_in_name_leads_to_its_function():
    offered = [point.name for point in entry_points(group=ENTRY_POINTS)]
    assert {"last_integer", "math_verify", "unit_tests", "judge", "soft_overlong"} <= set(offered)
    for name in offered:
        assert reward_name(load_reward(name)) == name


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(ValueError, match=r"no reward is called 'last_intger': did you mean last_integer.*\?"):
        load_reward("last_intger")
    with pytest.raises(ValueError, match=r"there are .*think_format"):
        load_reward("xyz")


def test_a_folder_or_hub_id_is_a_classifier(tmp_path, monkeypatch):
    assert load_reward("org/Skywork-Reward").__name__ == "Skywork-Reward"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helpful").mkdir()
    assert load_reward("helpful").model_id == "helpful"  # pyright: ignore[reportFunctionMemberAccess]


FACTORIES = """
def above(limit, *, strict=True):
    def reward(completions, **kwargs):
        return [len(c) > limit or (not strict and len(c) == limit) for c in completions]
    return reward

class Above:
    def __init__(self, limit):
        self.limit = limit
    def __call__(self, completions, **kwargs):
        return [len(c) > self.limit for c in completions]

number = 3
"""


def test_kwargs_make_the_reward_function(tmp_path):
    (tmp_path / "made.py").write_text(FACTORIES)
    above = load_reward(f"{tmp_path}/made.py:above", kwargs={"limit": 1, "strict": False})
    assert above(completions=["a", ""]) == [True, False]
    assert load_reward(f"{tmp_path}/made.py:Above", kwargs={"limit": 0})(completions=["a", ""]) == [True, False]
    with pytest.raises(ValueError, match=r"does not accept its kwargs \(lmit\): .*'limit'"):
        load_reward(f"{tmp_path}/made.py:above", kwargs={"lmit": 1})
    with pytest.raises(ValueError, match="does not accept kwargs: it is a int, not a factory"):
        load_reward(f"{tmp_path}/made.py:number", kwargs={})
    with pytest.raises(ValueError, match="is a class: name an instance of it or a function, or give its kwargs"):
        load_reward(f"{tmp_path}/made.py:Above")


def test_a_factory_without_kwargs_is_an_error_that_says_so(tmp_path):
    (tmp_path / "made.py").write_text("def anything():\n    return lambda completions, **kwargs: [0.0] * len(completions)\n")
    with pytest.raises(ValueError, match="returned a function: it is a factory, so give it `kwargs`"):
        scorer_of(f"{tmp_path}/made.py:anything").score(Inputs(prompts=["p"], completions=["c"], completion_ids=[[1]]))
