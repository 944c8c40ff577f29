"""Texts that YAML reads as something else: with `run_name: 007` the name is "007", not 7, and `data.subset=on` is "on".

    node = as_texts(node, str | None)           # of PyYAML's nodes, the scalars in the place of a text become texts
    takes_only_text(str | None)                 # True: the value of an override is taken literally

The type of the option decides which scalars are texts: `seed: 7` stays a number, and so does a value of which the type says
nothing (in `data.options`, or in the arguments of a function). `null`, `~` and nothing are None everywhere.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel

PREFIX = "tag:yaml.org,2002:"
TEXT, NULL, MERGE = f"{PREFIX}str", f"{PREFIX}null", f"{PREFIX}merge"
TYPES = {f"{PREFIX}bool": (bool,), f"{PREFIX}int": (int, float), f"{PREFIX}float": (float,)}
"""Tags of plain scalars, and the types of options for which they are no texts."""


def as_texts(node: yaml.Node, kind: Any) -> yaml.Node:
    """The node with scalars as texts where `kind`, the type of an option, asks for texts. Nothing is changed in place."""
    return _of_kinds(node, members(kind))


def takes_only_text(kind: Any) -> bool:
    """Whether all values of an option are texts, or None."""
    return all(one in (str, Path, types.NoneType) for one in members(kind))


def members(kind: Any) -> list[Any]:
    """The types of a union, without annotations."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return members(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for one in typing.get_args(kind) for member in members(one)]
    return [kind]


def _of_kinds(node: yaml.Node, kinds: list[Any]) -> yaml.Node:
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    items = [one for kind in lists for item in typing.get_args(kind) for one in members(item)]
    if isinstance(node, yaml.SequenceNode):
        values = [_of_kinds(value, items) for value in node.value]
        return yaml.SequenceNode(node.tag, values, node.start_mark, node.end_mark, node.flow_style)
    kinds = [*kinds, *items]  # options that take a list often take a single value too
    if isinstance(node, yaml.MappingNode):
        pairs = [_pair(key, value, kinds) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
    return _as_text(node) if _is_text(node, kinds) else node


def _pair(key: yaml.Node, value: yaml.Node, kinds: list[Any]) -> tuple[yaml.Node, yaml.Node]:
    """An entry of a mapping: the keys of `dict[str, ...]` and the options of a section are texts."""
    if key.tag == MERGE:
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        return key, yaml.SequenceNode(f"{PREFIX}seq", [_of_kinds(part, kinds) for part in parts])
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(key.value))
            return _as_text(key), value if field is None else as_texts(value, field.annotation)
        if typing.get_origin(kind) in (dict, Mapping):
            of_key, of_value = typing.get_args(kind)
            return (_as_text(key) if of_key is str else key), as_texts(value, of_value)
    return key, value


def _is_text(node: yaml.Node, kinds: list[Any]) -> bool:
    is_named = any(node.value in typing.get_args(one) for one in kinds if typing.get_origin(one) is Literal)
    is_other = any(one in kinds for one in TYPES.get(node.tag, ()))
    return node.tag != NULL and (is_named or (any(one in kinds for one in (str, Path)) and not is_other))


def _as_text(node: yaml.Node) -> yaml.Node:
    if not isinstance(node, yaml.ScalarNode):
        return node
    return yaml.ScalarNode(TEXT, node.value, node.start_mark, node.end_mark, node.style)
