"""The table of TRL's names: complete against the installed TRL, and made of names and options that exist."""

from __future__ import annotations

import dataclasses
from collections import Counter
from enum import Enum
from typing import Any

import pytest
from trl.trainer.grpo_config import GRPOConfig as TrlConfig

from rankup.grpo.config import GRPOConfig
from rankup.grpo.config.run_config import known_keys
from rankup.grpo.config.trl.fields import (
    ALIASES,
    ALL_NAMES,
    BATCH_FIELDS,
    FIELDS,
    NONE_IS_UNSET,
    OLDER_NAMES,
    OTHER_NAMES,
    RENAMED,
)

OF_TRL = {field.name: field for field in dataclasses.fields(TrlConfig)}
OPTIONS = {*known_keys().dotted(), "correction.vllm_importance_sampling_correction"}


def made(values: dict[str, Any]) -> GRPOConfig:
    """The configuration of a script with these keyword arguments, which a type checker does not know."""
    return GRPOConfig(**values)


def default_of(field: dataclasses.Field[Any]) -> object:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, Enum) else value


def test_every_field_of_the_installed_trl_is_known_and_no_other():
    assert list(FIELDS) == list(OF_TRL)


def test_names_of_other_classes_and_earlier_versions_are_no_fields():
    assert not (OTHER_NAMES.keys() | OLDER_NAMES.keys() | ALIASES.keys()) & OF_TRL.keys()
    assert set(ALIASES.values()) <= FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_is_that_of_trl(name: str):
    assert FIELDS[name].default == default_of(OF_TRL[name])


def test_the_kinds_of_all_fields():
    counts = Counter(field.kind for field in FIELDS.values())
    assert counts == {"mapped": 75, "other default": 7, "no effect": 83, "refused": 24}


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_field_names_options_that_exist_or_gives_a_reason(name: str):
    field = ALL_NAMES[name]
    if field.kind in ("mapped", "other default"):
        assert field.to and set(field.to) <= OPTIONS
    else:
        assert field.note and not field.to and not field.note.endswith(".")


def test_a_flat_name_that_is_also_ours_means_the_option_of_that_name():
    flat = {dotted.rpartition(".")[2]: dotted for dotted in known_keys().dotted()}
    assert {name: RENAMED[name] for name in RENAMED if name in flat} == {name: flat[name] for name in RENAMED if name in flat}
    assert all(name in flat or name in RENAMED for name in NONE_IS_UNSET), "names that are converted drop None anyway"


@pytest.mark.parametrize("name", [name for name, field in ALL_NAMES.items() if field.kind == "no effect"])
@pytest.mark.parametrize("value", [True, "text", 7, None])
def test_a_name_without_effect_changes_nothing_whatever_its_value(name: str, value: object):
    assert made({name: value}).model_dump() == GRPOConfig().model_dump()


REFUSED = [name for name, field in ALL_NAMES.items() if field.kind == "refused"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_is_one_line_with_what_to_do_instead(name: str):
    with pytest.raises(ValueError) as caught:
        made({name: "something"})
    assert str(caught.value) == f"{name}: is not supported; {ALL_NAMES[name].note}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_with_trls_default_asks_for_nothing(name: str):
    assert made({name: ALL_NAMES[name].default}).model_dump() == GRPOConfig().model_dump()


def test_all_of_trls_defaults_at_once_are_a_configuration():
    """Except for `eval_strategy='no'`: asked for, it switches the evaluation before the first step off."""
    defaults = {name: field.default for name, field in FIELDS.items() if name != "eval_strategy"}
    config = made(defaults)
    assert (config.optim.prompts_per_step, config.optim.num_train_epochs) == (1, 3.0)
    assert (config.rollout.num_generations, config.rollout.max_completion_length) == (8, 512)
    assert (config.optim.learning_rate, config.optim.lr_scheduler_type) == (1e-6, "linear")
    assert not GRPOConfig(eval_strategy="no").logging.eval_before


def test_the_fields_of_the_batch_have_trls_defaults():
    assert {FIELDS[name].kind for name in BATCH_FIELDS} == {"other default"}
