"""What callbacks and scripts read of a configuration by TRL's names."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from rankup.grpo.config import GRPOConfig, resolve_epochs
from rankup.grpo.config.trl.fields import ALL_NAMES
from rankup.grpo.config.trl.reading import DERIVED


@pytest.mark.parametrize("name", sorted({*ALL_NAMES, *DERIVED} - {"optim"}))
def test_every_name_can_be_read(name: str):
    getattr(GRPOConfig(), name)


def test_names_that_nobody_knows_are_no_attributes():
    with pytest.raises(AttributeError, match="no option fooz"):
        getattr(GRPOConfig(), "fooz")  # noqa: B009  # for type checkers it is none either


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"save_total_limit": 4}, "save_total_limit", 4),
        ({"keep_last": 4}, "save_total_limit", 4),
        ({"logging": {"eval_steps": 0}}, "eval_strategy", "no"),
        ({"eval_strategy": "steps", "eval_steps": 3}, "eval_strategy", "steps"),
        ({"evaluation_strategy": "no"}, "evaluation_strategy", "no"),
        ({"save_strategy": "no"}, "save_strategy", "no"),
        ({"bf16": False}, "bf16", False),
        ({"fp16": True}, "bf16", False),
        ({"fp16": True}, "fp16", True),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers", 2),
        ({}, "dataloader_num_workers", 0),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", 4),
        ({"load_best_model_at_end": True, "eval_steps": 5}, "load_best_model_at_end", True),
    ],
)
def test_a_name_has_the_value_of_its_option_or_the_one_given_or_trl_s_default(
    values: dict[str, Any], name: str, expected: object
):
    assert getattr(GRPOConfig(**values), name) == expected


def test_given_values_survive_copies():
    config = GRPOConfig(dataloader_num_workers=2, num_train_epochs=1)
    for copy in (config.model_copy(), pickle.loads(pickle.dumps(config)), resolve_epochs(config, rows=40)):
        assert getattr(copy, "dataloader_num_workers") == 2  # noqa: B009
