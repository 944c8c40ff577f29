"""The base class of every configuration section. Imports no torch."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are finite, instances are frozen, and paths of Python are texts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _paths_are_texts(cls, values: Any) -> Any:
        return {name: _without_paths(value) for name, value in values.items()} if isinstance(values, Mapping) else values


def _without_paths(value: Any) -> Any:
    """A path as text, or a list with its paths as texts; not the values of a mapping, which may be a function's arguments."""
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    return str(value) if isinstance(value, PurePath) else value
