"""Arrow's padding: fields that a mapping never had, which a typed table adds as nulls.

    unpadded({"prompt": [{"role": "user", "content": "a", "name": None}]}, features)        # without name

A typed table (`datasets`, Parquet) gives every mapping of a column the keys of all its mappings, at any depth. A chat template
tests whether a key exists, and writes what a tool call's arguments hold, so the nulls would reach the prompt. In such a table a
null that somebody wrote cannot be told from padding. Columns of the type `datasets.Json` hold values as they were written.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that the chat template gets, besides the prompt."""


def unpadded(row: Mapping[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of a typed table with conversations and `TEMPLATE_COLUMNS` as they were before padding; other columns unchanged.

    features: those of the table; None: unknown, so that every null in a mapping is taken for padding.
    """
    return {
        name: _without_nulls(value, None if features is None else features.get(name))
        if name in TEMPLATE_COLUMNS or _is_conversation(value)
        else value
        for name, value in row.items()
    }


def unpadded_arrays(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in memory, in which conversations and `TEMPLATE_COLUMNS` are arrays if pandas has read them from a typed table."""
    padded = {name: value for name, value in row.items() if isinstance(value, np.ndarray)}
    return {**row, **unpadded(padded, None)} if padded else dict(row)


def _is_conversation(value: Any) -> bool:
    is_list = isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 1)
    return is_list and len(value) > 0 and isinstance(value[0], Mapping) and "role" in value[0]


def _without_nulls(value: Any, feature: Any) -> Any:
    """Without nulls in the mappings that are structs in the table."""
    if isinstance(value, Mapping) and (feature is None or isinstance(feature, Mapping)):
        return {
            key: _without_nulls(one, None if feature is None else feature.get(key))
            for key, one in value.items()
            if one is not None or (key == "content" and "role" in value)  # a message has content, which may be None
        }
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and not isinstance(feature, datasets.Json):
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        return [_without_nulls(one, inner) for one in value]
    return value
