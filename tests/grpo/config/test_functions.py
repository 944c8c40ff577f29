"""Options that take functions: what they accept, their text in files, and how they are loaded and sent."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from rankup.grpo.config import GRPOConfig, dump_config, load_config, resolve_epochs
from rankup.grpo.config.functions import load_function, text_of
from rankup.rewards.answers import last_integer
from rankup.rewards.loading import load_object

OPTIONS = {
    "loss_type": "algorithm.loss_type",
    "advantage_estimator": "algorithm.advantage_estimator",
    "group_filter": "algorithm.group_filter",
    "sampler": "data.sampler",
}


class Filter:
    """An object that can be called."""

    def __call__(self, group: Any) -> bool:
        return True

    def method(self, group: Any) -> bool:
        return True


def with_function(option: str, function: Any, **others: Any) -> GRPOConfig:
    values: dict[str, Any] = {option: function, **others}
    return GRPOConfig(**values)


def value_of(config: GRPOConfig, option: str) -> Any:
    section, _, field = OPTIONS[option].partition(".")
    return getattr(getattr(config, section), field)


@pytest.fixture
def in_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The function of a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(*inputs):\n    return inputs\n\n\nvalue = 3\n\n\nclass C:\n    pass\n")
    function: Any = load_object("mine.py:f")
    return function


# ------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_takes_a_function_an_object_that_can_be_called_or_a_spec(option: str) -> None:
    for function in (lambda *inputs: inputs, Filter(), functools.partial(max, 1), last_integer, "mine.py:f", "a.module:f"):
        assert value_of(with_function(option, function), option) is function


@pytest.mark.parametrize("option", OPTIONS)
def test_classes_and_other_objects_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{OPTIONS[option]}: must be a function .* \(got the class Filter\)$"):
        with_function(option, Filter)
    with pytest.raises(ValueError, match=rf"^{OPTIONS[option]}: must be a function, or text such as .* \(got 5\)$"):
        with_function(option, 5)
    with pytest.raises(ValueError, match=rf"^{OPTIONS[option]}: must be .*path/to/file.py:name \(got 'mine.py'\)$"):
        with_function(option, "mine.py")


def test_an_object_without_a_hash_is_accepted() -> None:
    class Unhashable(Filter):
        __hash__ = None  # type: ignore[assignment]

    assert GRPOConfig(loss_type=Unhashable()).algorithm.epsilon_high == 0.28


@pytest.mark.parametrize("scale", ["group", "none", True])
def test_a_scale_that_would_have_no_effect_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^algorithm.scale_rewards: has no effect .*: leave it out$"):
        GRPOConfig(advantage_estimator=last_integer, scale_rewards=scale)
    config = GRPOConfig(advantage_estimator=last_integer, loss_type="dr_grpo", scale_rewards=None)
    assert config.algorithm.scale_rewards == "none", "the default of an objective is no mistake"


def test_penalties_and_normalised_sums_are_refused_with_a_function_for_advantages() -> None:
    with pytest.raises(ValueError, match=r"^algorithm.soft_overlong_tokens: .* use the reward function soft_overlong instead$"):
        GRPOConfig(advantage_estimator=last_integer, soft_overlong_tokens=4)
    with pytest.raises(ValueError, match=r"at group \(got rankup.rewards.answers:last_integer\)$"):
        GRPOConfig(advantage_estimator=last_integer, multi_objective_aggregation="normalize_then_sum")


# ------------------------------------------------------------------------------------------------------- their text


def test_a_function_that_can_be_imported_is_its_spec(in_file: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_of(last_integer) == "rankup.rewards.answers:last_integer"
    assert text_of(in_file) == "mine.py:f"
    for function in (last_integer, in_file):
        assert load_function("algorithm.loss_type", text_of(function)) is function
    folder = Path.cwd()
    monkeypatch.chdir("/")
    assert text_of(in_file) == f"{folder.relative_to('/')}/mine.py:f"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert text_of(in_file) == f"{folder}/mine.py:f"


def without_spec() -> dict[str, Any]:
    def replaced() -> None: ...

    replaced.__qualname__ = "last_integer"
    replaced.__module__ = "rankup.rewards.answers"
    return {
        f"<function without_spec.<locals>.<lambda> in {__name__}>": lambda inputs: inputs,
        f"<object Filter in {__name__}>": Filter(),
        f"<function Filter.method in {__name__}>": Filter().method,
        "<partial last_integer in rankup.rewards.answers>": functools.partial(last_integer),
        "<function last_integer in rankup.rewards.answers>": replaced,
    }


@pytest.mark.parametrize(("text", "function"), without_spec().items())
def test_a_function_without_a_spec_is_text_that_does_not_load(tmp_path: Path, text: str, function: Any) -> None:
    assert text_of(function) == text
    for option in OPTIONS:
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(with_function(option, function)))
        read = value_of(load_config(path), option)  # as `rankup export` does
        assert read == text
        with pytest.raises(ValueError, match=rf"^{OPTIONS[option]}: <.*> was passed in Python, .*path/to/file.py:name$"):
            load_function(OPTIONS[option], read)


def test_a_function_of_a_script_has_no_spec(tmp_path: Path) -> None:
    """To import a script would run it again."""
    script = tmp_path / "script.py"
    script.write_text("from rankup.grpo.config.functions import text_of\ndef mine(): ...\nprint(text_of(mine))\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.stdout == "<function mine in __main__>\n", result.stderr


def test_a_configuration_with_specs_survives_yaml(tmp_path: Path, in_file: Callable[..., Any]) -> None:
    path = tmp_path / "config.yaml"
    given: dict[str, Any] = dict.fromkeys(OPTIONS, "mine.py:f")
    specs = GRPOConfig(**given, run_name="config")
    path.write_text(dump_config(specs))
    assert load_config(path) == specs
    assert dump_config(load_config(path)) == dump_config(specs)
    as_functions: dict[str, Any] = dict.fromkeys(OPTIONS, in_file)
    assert dump_config(GRPOConfig(**as_functions, run_name="config")) == dump_config(specs)
    assert specs.model_dump(mode="json")["algorithm"]["group_filter"] == "mine.py:f"


@pytest.mark.parametrize(
    ("name", "message"),
    [("value", "mine.py:value is not a function"), ("C", "mine.py:C is a class: name a function"), ("g", "mine.py has no 'g'")],
)
def test_the_error_for_a_spec_that_names_no_function(in_file: Callable[..., Any], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function("algorithm.group_filter", f"mine.py:{name}")


# --------------------------------------------------------------------------------------------------------- on the way


def test_functions_reach_the_resolved_configuration_and_copies() -> None:
    functions: dict[str, Any] = {option: (lambda *inputs: inputs) for option in OPTIONS}
    config = GRPOConfig(**functions, num_train_epochs=2)
    for copy in (resolve_epochs(config, rows=100), GRPOConfig(algorithm=config.algorithm, data=config.data)):
        assert {option: value_of(copy, option) for option in OPTIONS} == functions


def test_a_configuration_with_a_lambda_reaches_another_process() -> None:
    add = 2
    config = GRPOConfig(group_filter=lambda group: group + add, loss_type=last_integer)
    assert cloudpickle.loads(cloudpickle.dumps(config)).algorithm.group_filter(40) == 42
    code = (
        "import cloudpickle, sys; config = cloudpickle.load(sys.stdin.buffer)\n"
        "print(config.algorithm.group_filter(40), config.algorithm.loss_type.__name__)"
    )
    sent = _by_value(config)
    result = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True)
    assert result.stdout.split() == [b"42", b"last_integer"], result.stderr


def _by_value(config: GRPOConfig) -> bytes:
    """As a script sends it: this module is not importable elsewhere either."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(config)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
