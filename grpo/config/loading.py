"""Reading and writing configurations: YAML, overrides, flat names, readable errors.

`run_config.py` passes a `KnownKeys`, the table of its sections and fields. This module knows no field by name; the names of TRL
and PEFT are in `trl/fields.py`.
"""

import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .texts import as_texts, members, takes_only_text
from .trl.convert import Converted, convert
from .trl.fields import ALL_NAMES, HINTS, NONE_IS_UNSET, RENAMED, TEXT_FOR_SECTIONS
from .trl.reading import read

__all__ = [
    "KnownKeys", "apply_override", "by_section", "describe_errors", "dump_yaml", "nest", "parse_yaml", "read", "read_run_file",
]  # fmt: skip


@dataclass(frozen=True)
class KnownKeys:
    """The names of a configuration: fields by section, and top-level keys that are not sections.

    types: the type of every section, of every option by its dotted name, and of every top-level key.
    """

    sections: Mapping[str, tuple[str, ...]]
    top_level: tuple[str, ...]
    types: Mapping[str, Any]

    def dotted(self) -> list[str]:
        """All names in the form that users write: `section.field`, and the top-level keys."""
        return [f"{section}.{field}" for section, fields in self.sections.items() for field in fields] + [
            *self.top_level
        ]

    def locate(self, name: str) -> str | None:
        """The dotted name of a flat one; None if it is unknown. ValueError if it occurs in several sections."""
        if name in RENAMED:
            return RENAMED[name]
        homes = [f"{section}.{name}" for section, fields in self.sections.items() if name in fields]
        if len(homes) > 1:
            raise ValueError(f"{name}: occurs in several sections; write {' or '.join(homes)}")
        return homes[0] if homes else None

    def type_of(self, name: str) -> Any:
        """The type of what a user may write under a name, dotted or flat, ours or TRL's; Any if it says nothing."""
        dotted = name if name in self.types else self.locate(name) or name
        if dotted in self.types:
            may_be_text = self.types.get(f"{name}.{TEXT_FOR_SECTIONS.get(name)}") is str
            return self.types[dotted] | str if may_be_text else self.types[dotted]
        words = set(re.findall(r"\w+", ALL_NAMES[name].type)) if name in ALL_NAMES else set()
        return str if "str" in words and not words & {"bool", "int", "float"} else Any

    def hint(self, name: str) -> str:
        """A suggestion for the unknown dotted `name`."""
        section, _, field = name.rpartition(".")
        if field in HINTS:
            return HINTS[field]
        if section and field in ALL_NAMES and field not in RENAMED:
            return f"{field} is a name of TRL: write it outside of the sections"
        candidates = self.dotted()
        if not section:
            ours = {*self.sections, *(field for fields in self.sections.values() for field in fields)}
            candidates += [*self.sections, *(name for name in ALL_NAMES if name not in ours and name not in RENAMED)]
        scores = {known: _likeness(name, known) for known in candidates}
        best = max(scores.values())
        if best >= 0.6:
            return f"did you mean {' or '.join(known for known in candidates if scores[known] > best - 0.01)}?"
        if section in self.sections:
            return f"{section} has {', '.join(self.sections[section])}"
        return f"sections and keys are {', '.join([*self.sections, *self.top_level])}"


def _likeness(name: str, known: str) -> float:
    """Similarity of two dotted names, 0 to 1: complete, or of the last parts only (for a field in the wrong section)."""
    complete = SequenceMatcher(None, name, known).ratio()
    return max(complete, SequenceMatcher(None, name.rpartition(".")[2], known.rpartition(".")[2]).ratio())


# YAML. PyYAML reads version 1.1, in which `1e-4` is text, `2025-01-31` a date, `010` is 8 and `1:30` is 90.

_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^[-+]?(?:0b[01][01_]*|0o[0-7][0-7_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|[0-9][0-9_]*)$")

NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, `010` is ten, dates and times are text, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0 if text.lstrip("+-")[1:2] in ("b", "o", "x") else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number; indents lists under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Escape text with Unicode line ends: PyYAML writes them verbatim and reads back a different text."""
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_run_file(path: Path, keys: KnownKeys | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file. With `keys`, values of text options are texts (`texts.py`).

    Raises FileNotFoundError, or ValueError with the line of the mistake.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"run file not found: {path}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), type_of=None if keys is None else keys.type_of)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{_describe_yaml_error(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain sections such as 'model:' and 'optim:' (got {_shorten(values)})")
    return values


def parse_yaml(text: str, *, type_of: Callable[[str], Any] | None = None, kind: Any = Any) -> Any:
    """Parse the text of a run file, or of a value of the type `kind`. Raises yaml.YAMLError.

    type_of: the type of the value of each key; None: not known.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if type_of is not None and isinstance(node, yaml.MappingNode):
            node.value = [(key, as_texts(value, type_of(str(key.value)))) for key, value in node.value]
        return loader.construct_document(as_texts(node, kind))
    finally:
        loader.dispose()


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_run_file` reads back to the same values, with keys in the order of the mapping."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return ": " + " ".join(str(error).split())


# From user input to sections


def by_section(values: Mapping[Any, Any], keys: KnownKeys) -> Converted:
    """What a user wrote as sections of ours, without flat names and TRL's; the last step before validation.

    Raises:
        ValueError: a value is set twice, or one of TRL's options is not supported.
    """
    return convert(nest(values, keys))


def nest(values: Mapping[Any, Any], keys: KnownKeys) -> dict[str, Any]:
    """A new mapping with flat names moved into their sections and `model: "name"` expanded.

    Other names are kept: those of TRL, which `trl/convert.py` converts, and unknown ones, which validation reports. Raises
    ValueError if a value is set twice.
    """
    nested: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        value = value.value if isinstance(value, Enum) else value  # transformers' names of strategies
        if name in keys.sections:
            nested[name] = _section_values(name, value)
        elif name in NONE_IS_UNSET and value is None:
            continue
        elif name not in keys.top_level and keys.locate(str(name)):
            flat[name] = value
        else:
            nested[str(name)] = value
    for name, value in flat.items():
        dotted = keys.locate(name) or name
        section, _, field = dotted.rpartition(".")
        fields = nested.setdefault(section, {}) if section else nested
        if field in fields:
            raise ValueError(f"{name}: is the same option as {dotted}, which is set too; keep one of them")
        fields[field] = value
    return nested


def _section_values(name: str, value: Any) -> dict[Any, Any]:
    if value is None:  # a section whose lines are all commented out
        return {}
    if isinstance(value, str | Path) and name in TEXT_FOR_SECTIONS:
        return {TEXT_FOR_SECTIONS[name]: str(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: must be a section with keys (got {_shorten(value)})")
    return dict(value)


def apply_override(values: dict[str, Any], override: str, keys: KnownKeys) -> None:
    """Set one `section.field=value` in nested `values`, in place; the value is YAML.

    The value of an option that takes only texts is that text as it is, in quotes or not; only null is None.

    `name=value` with a flat name, `model=name`, `section={field: value}` and keys of an option (`data.options.size=9`)
    work too. Raises ValueError if the text has no `=` or the value is not valid YAML.
    """
    name, equals, text = override.partition("=")
    name = name.strip()
    if not (name and equals):
        raise ValueError(f"{override}: is not an override; write section.field=value")
    value = _override_value(name, text, _type_of_override(name, keys))
    if name in keys.sections:
        values.setdefault(name, {}).update(_section_values(name, value))
        return
    dotted = name if "." in name or name in keys.top_level else keys.locate(name) or name
    *parents, field = dotted.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ValueError(f"{name}: {parent} has no keys (it is {_shorten(place)})")
    place[field] = value


def _type_of_override(name: str, keys: KnownKeys) -> Any:
    """Of an option, or of a key of one."""
    section, _, rest = name.partition(".")
    option, *within = rest.split(".")
    if not within or f"{section}.{option}" not in keys.types:
        return keys.type_of(name)
    kind = keys.types[f"{section}.{option}"]
    for key in within:
        kind = next((found for one in members(kind) if (found := _type_in(one, key)) is not Any), Any)
    return kind


def _type_in(kind: Any, key: str) -> Any:
    """The type of a key's value, of a mapping or of an option that has options."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(key)
        return Any if field is None else field.annotation
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any


def _override_value(name: str, text: str, kind: Any) -> Any:
    """The value in an override. That of an option that takes only texts is literal, unless it is in quotes or null."""
    if takes_only_text(kind) and text.strip() not in NULLS and text.strip()[0] not in "\"'":
        return text
    try:
        return parse_yaml(text, kind=kind)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {text!r} is not valid YAML{_describe_yaml_error(error)}; put quotes around it") from None


# Errors

_MESSAGES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "finite_number": "must be a finite number",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "path_type": "must be a path",
    "too_short": "must have {min_length} or more items",
    "model_type": "must be a mapping",
}


def describe_errors(error: ValidationError, keys: KnownKeys) -> str:
    """One line per problem: `rollout.num_generations: must be at least 2 (got 1)`."""
    return "\n".join(_describe_error(details, keys) for details in error.errors(include_url=False))


def _describe_error(details: ErrorDetails, keys: KnownKeys) -> str:
    name = ".".join(str(part) for part in details["loc"] if not str(part).startswith("<"))  # <...>: a union's tag
    context = details.get("ctx", {})
    if details["type"] == "extra_forbidden":
        return f"{name}: unknown key; {keys.hint(name)}"
    if details["type"] == "value_error":  # raised by our validators, with a complete message
        return f"{name}: {context['error']}" if name else str(context["error"])  # a check of several sections names its option
    message = _MESSAGES.get(details["type"], details["msg"]).format(**context)
    return f"{name}: {message} (got {_shorten(details['input'])})"


def _shorten(value: object, *, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
