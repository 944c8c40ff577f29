"""The options of a script while TRL's names in it are converted.

script = Script({"logging_steps": 5, "logging": {"eval_steps": 10}})
script.trl("logging_steps"), script.ours("logging.eval_steps")      # 5, 10
script.set("logging.completions_steps", 5, by="logging_steps")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .fields import ALIASES, ALL_NAMES

Value = Any
"""A value as a user wrote it."""


class Script:
    """See the module's docstring. `values` has sections and top-level names; those of TRL are taken out of it."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
        # Not `seed`, which is an option of ours; nor the section `optim`.
        self.names = [
            name
            for name, value in self.values.items()
            if name in ALL_NAMES and (name, type(value)) != ("optim", dict) and ALL_NAMES[name].to != (name,)
        ]
        taken = {name: self.values.pop(name) for name in self.names}
        self._trl = {ALIASES.get(name, name): value for name, value in taken.items() if value is not None}

    def trl(self, name: str) -> Value:
        """The value of a name of TRL that is converted; None if it is not set."""
        return self._trl.get(name)

    @property
    def given(self) -> Mapping[str, Value]:
        """The values of TRL's names that are set."""
        return self._trl

    def ours(self, dotted: str) -> Value:
        """The value of an option of ours; None if it is not set."""
        section, _, field = dotted.rpartition(".")
        fields = self.values.get(section) if section else self.values
        return fields.get(field) if isinstance(fields, dict) else None

    def set(self, dotted: str, value: Value, *, by: str) -> None:
        """Set an option of ours by a name of TRL.

        Raises:
            ValueError: it is set already.
        """
        if self.ours(dotted) is not None:
            raise ValueError(f"{by}: is the same option as {dotted}, which is set too; keep one of them")
        self.replace(dotted, value)

    def replace(self, dotted: str, value: Value) -> None:
        """Set an option of ours, whether it is set or not; None: leave it to its default."""
        section, _, field = dotted.rpartition(".")
        fields = self.values.setdefault(section, {}) if section else self.values
        if value is None:
            fields.pop(field, None)
        else:
            fields[field] = value


def number(value: Value, name: str) -> float:
    """A number, also as text.

    Raises:
        ValueError: it is none, by the name of the option.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be a number (got {value!r})") from None


def positive(value: Value, name: str) -> int:
    """An integer of at least 1, also as text or as a float without a fraction.

    Raises:
        ValueError: it is none, by the name of the option.
    """
    found = number(value, name)
    if found != int(found) or found < 1:
        raise ValueError(f"{name}: must be an integer of at least 1 (got {value!r})")
    return int(found)


def mapping(value: Value, name: str) -> dict[str, Value]:
    """A mapping, also as JSON text, as TRL's command line has it.

    Raises:
        ValueError: it is none, by the name of the option.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a mapping (got {value!r})")
    return value
