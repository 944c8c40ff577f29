"""JSON from which values come back as they were: with bytes, decimals, and keys that are not text.

    decode(encode({"n": 1.0, "gold": Decimal("12.50"), 3: b"\\xff"}))       # an equal dictionary
    strict({"mean": np.float32("nan")})                                     # {"mean": None}
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from numbers import Integral
from pathlib import Path
from typing import Any

_TAG = "$rankup."
"""Starts the only key of an object that represents another type; a user's dictionary that looks like one is tagged too."""


def encode(value: Any, *, default: Callable[[Any], str] = str) -> str:
    """The JSON text of a value of None, booleans, numbers, texts, bytes, decimals, lists and dictionaries of these.

    Tuples become lists, and values of any other type what `default` returns.
    """
    return json.dumps(_tagged(value), default=default)


def decode(text: str) -> Any:
    """The value whose text `encode` has returned."""
    return json.loads(text, object_hook=_untagged)


def strict(value: Any) -> Any:
    """`value` in JSON types: scalars of any library become Python's, numbers that are not finite become None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _tagged(value: Any) -> Any:
    if isinstance(value, dict):
        items = {key: _tagged(item) for key, item in value.items()}
        if all(type(key) is str for key in items):
            return {f"{_TAG}dict": list(items.items())} if _is_tagged(items) else items
        return {f"{_TAG}dict": [[_tagged(key), item] for key, item in items.items()]}
    if isinstance(value, list | tuple):
        return [_tagged(item) for item in value]
    if isinstance(value, bytes):
        return {f"{_TAG}bytes": base64.b64encode(value).decode()}
    return {f"{_TAG}decimal": str(value)} if isinstance(value, Decimal) else value


def _untagged(value: dict[str, Any]) -> Any:
    if not _is_tagged(value):
        return value
    ((tag, content),) = value.items()
    if tag == f"{_TAG}dict":
        return {_as_key(key): item for key, item in content}
    return base64.b64decode(content) if tag == f"{_TAG}bytes" else Decimal(content)


def _as_key(value: Any) -> Any:
    """A list, at any depth, was a tuple if it is the key of a dictionary."""
    return tuple(map(_as_key, value)) if isinstance(value, list) else value


def _is_tagged(value: dict[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith(_TAG)
