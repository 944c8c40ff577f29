"""Texts that YAML would read as numbers, dates, truth values or comments stay the texts that the user wrote."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import GRPOConfig, dump_config, load_config
from rankup.grpo.config.loading import parse_yaml
from rankup.grpo.config.run_config import known_keys
from rankup.grpo.config.texts import members

Load = Callable[..., GRPOConfig]

ODD = ["007", "12:30", "1e5", "1_000", "0x1F", "0b1", "3.0", ".5", "-1", "+2", ".inf", "on", "No", "true", "2025-01-31", "="]
ONLY_IN_OVERRIDES = ["a: b", "#1", "[x", "*star", "@at", "%d", "a #b", "{x}", "- a", "| a", "a  b"]
TEXTS = [name for name, kind in known_keys().types.items() if any(one in (str, Path) for one in members(kind))]
"""All options whose value may be a free text."""


def at(config: GRPOConfig, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def takes_words(name: str) -> bool:
    """Whether an option takes any word, such as a path: others have checks of their own."""
    section, _, field = name.partition(".")
    values: dict[str, Any] = {section: {field: "word"}}
    try:
        GRPOConfig(**values)
    except ValueError:
        return False
    return True


FREE = [name for name in TEXTS if takes_words(name) and name != "logging.working_dir"]  # which only runs write


@pytest.mark.parametrize("text", ODD)
def test_every_text_option_keeps_its_text(load: Load, text: str) -> None:
    assert {"logging.run_name", "data.subset", "model.revision", "model.name", "data.train", "lora.start_from"} <= set(FREE)
    for name in FREE:
        section, _, field = name.partition(".")
        assert str(at(load(f"{section}:\n  {field}: {text}\n"), name)) == text, name
        assert str(at(load("", f"{name}={text}"), name)) == text, name


@pytest.mark.parametrize("text", ONLY_IN_OVERRIDES)
def test_an_override_of_a_text_option_is_literal(load: Load, text: str) -> None:
    assert load("", f"logging.run_name={text}").logging.run_name == text
    assert load("", f"data.system_prompt={text}").data.system_prompt == text


@settings(deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: text.strip() not in ("", "~", "null", "Null", "NULL")))
def test_an_override_is_the_text_behind_the_sign(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    if text.strip()[0] in "\"'":
        return
    run_file = tmp_path_factory.mktemp("run") / "mine.yaml"
    run_file.write_text("")
    config = load_config(run_file, [f"data.system_prompt={text}"])
    assert config.data.system_prompt == text
    run_file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(run_file).data.system_prompt == text


@pytest.mark.parametrize("text", ["", "null", "~", " "])
def test_nothing_and_null_are_none(load: Load, text: str) -> None:
    assert load("data: {subset: a}", f"data.subset={text}").data.subset is None
    assert load(f"data: {{subset: {text}}}").data.subset is None


@pytest.mark.parametrize(("text", "value"), [("'null'", "null"), ('"007"', "007"), ('"a\\nb"', "a\nb"), ("'it''s'", "it's")])
def test_quotes_are_those_of_yaml(load: Load, text: str, value: str) -> None:
    assert load(f"data: {{subset: {text}}}").data.subset == value == load("", f"data.subset={text}").data.subset


def test_texts_in_lists_mappings_and_short_forms(load: Load) -> None:
    assert load("lora: {targets: [1, on]}").lora.targets == ["1", "on"]
    assert load("", "lora.targets=[1, on]").lora.targets == ["1", "on"]
    assert load("data: {eval: {007: 1, on: 2.0}}").data.eval == {"007": "1", "on": "2.0"}
    assert load("", "data.eval={007: 1}", "data.eval.1e5=on").data.eval == {"007": "1", "1e5": "on"}
    assert load("data: {eval: 007}").data.eval == "007"
    assert load("model: 007").model.name == "007" == load("", "model=007").model.name
    assert load("", "model={name: 007, revision: 1e5}").model.revision == "1e5"
    assert load("run_name: 007").logging.run_name == "007" == load("", "run_name=007").logging.run_name
    function = "{function: last_integer, name: 007, weight: 2, kwargs: {a: 007}}"
    (entry,) = load(f"rewards: {{functions: [{function}]}}").rewards.entries()
    assert (entry.name, entry.weight, entry.kwargs) == ("007", 2.0, {"a": 7})
    assert load("rewards: {functions: {function: last_integer, name: on}}").rewards.entries()[0].name == "on"
    assert load("lora: {rank_pattern: {1: 8}}").lora.rank_pattern == {"1": 8}


def test_names_of_trl(load: Load) -> None:
    assert load("model_name_or_path: 007\ndataset_config: on\nmodel_revision: 1e5").model.name == "007"
    assert load("dataset_config: on").data.subset == "on"
    assert load("eval_strategy: no").logging.eval_steps == 0


def test_shared_nodes_are_read_by_the_type_of_each_place(load: Load) -> None:
    config = load("data: &one {subset: &n 7, eval_rows: *n}\nlogging: {run_name: *n}")
    assert (config.data.subset, config.data.eval_rows, config.logging.run_name) == ("7", 7, "7")
    merged = parse_yaml("{<<: {a: 007}, b: 007}", kind=dict[str, str])
    assert merged == {"a": "007", "b": "007"}


def test_other_values_keep_their_types(load: Load) -> None:
    assert load("", "model.share_base_weights=true").model.share_base_weights is True
    assert load("model: {share_base_weights: on}").model.share_base_weights is True
    assert load("rewards: {on_error: 0}").rewards.on_error == 0.0
    assert load("data: {options: {a: 007, b: on, c: 1e5, 1: x}}").data.options == {"a": 7, "b": True, "c": 1e5, "1": "x"}
    assert load("", "data.options.a=007").data.options == {"a": 7}
    assert load("logging: {profile_steps: 3}").logging.profile_steps == [3]
    assert load("seed: 7").seed == 7


def test_a_name_in_python_is_text() -> None:
    with pytest.raises(ValueError, match=r"^model.name: must be text"):
        GRPOConfig(model={"name": 7})  # type: ignore[arg-type]
    assert yaml.safe_load(dump_config(GRPOConfig(run_name="007")))["logging"]["run_name"] == "007"


def test_paths_of_python_are_texts() -> None:
    path = Path("some") / "where"
    data = {"train": [path, "b"], "chat_template": path}
    config = GRPOConfig(model=path, lora={"start_from": path}, data=data)  # type: ignore[arg-type]
    assert (config.model.name, config.lora.start_from, config.data.train) == ("some/where", "some/where", ["some/where", "b"])
    assert (config.data.chat_template, GRPOConfig(output_dir=path).logging.output_dir) == ("some/where", path)
    rewards = GRPOConfig(functions=[{"function": "a.py:b", "kwargs": {"file": path}}]).rewards  # type: ignore[typeddict-item]
    assert rewards.entries()[0].kwargs == {"file": path}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("structured_outputs.regex", "[0-9]+", {"structured_outputs": {"regex": "[0-9]+"}}),
        ("structured_outputs.regex", "007", {"structured_outputs": {"regex": "007"}}),
        ("structured_outputs.choice", "[on, 7]", {"structured_outputs": {"choice": ["on", "7"]}}),
        ("structured_outputs.json", "{type: object}", {"structured_outputs": {"json": {"type": "object"}}}),
        ("bad_words", "[on, 7]", {"bad_words": ["on", "7"]}),
        ("min_tokens", "007", {"min_tokens": 7}),
    ],
)
def test_overrides_inside_of_an_option(load: Load, name: str, text: str, value: object) -> None:
    config = load("", f"rollout.generation_kwargs.{name}={text}")
    assert config.rollout.generation_kwargs.model_dump(exclude_unset=True) == value


def test_all_types_of_options_are_known() -> None:
    """A new kind of type must be one that `texts.py` looks into."""
    for name, kind in known_keys().types.items():
        for one in members(kind):
            origin = typing.get_origin(one)
            assert origin in (None, list, dict, tuple, typing.Literal) or "Callable" in str(one), (name, kind)
