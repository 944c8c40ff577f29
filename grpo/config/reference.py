"""The reference of all options, docs/options.md, generated from the fields of the configuration and their docstrings.

    python -m rankup.grpo.config.reference docs/options.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ...rewards.config import RewardFunction
from ...rollout.generation_kwargs import GenerationKwargs, StructuredOutputs
from ...section import Section
from .data import EvalSet
from .run_config import DERIVED_DEFAULTS, GRPOConfig, known_keys
from .trl.fields import RENAMED

INTRODUCTION = """# Options

All options of a run file, by section, with their defaults. Override any of them on the command line with
`section.field=value`, or pass them to `GRPOConfig` in Python, where `null` is `None`. Unknown names and invalid values are
errors. A text needs no quotes: a run named `007`, `12:30` or `on` keeps its name, and on the command line the value of an
option that takes only text is literal (`data.system_prompt=Answer: yes`). This page is generated:
`python -m rankup.grpo.config.reference docs/options.md`.
"""


def reference() -> str:
    """The text of docs/options.md."""
    parts, keys, fields = [INTRODUCTION], known_keys(), GRPOConfig.model_fields
    for name in keys.sections:
        section = cast(type[Section], fields[name].annotation)
        parts.append(f"## {name}\n\n{_one_line(section.__doc__)}\n\n{_table(name, section.model_fields)}")
        if name == "rewards":
            text = "An entry of `rewards.functions` may be a mapping with these keys:"
            parts.append(f"{text}\n\n{_table('', RewardFunction.model_fields)}")
        if name == "data":
            text = "A named set of `data.eval` may be a mapping with these keys; null is the option of the section:"
            parts.append(f"{text}\n\n{_table('', EvalSet.model_fields)}")
        if name == "rollout":
            text = "`rollout.generation_kwargs` is a mapping with these keys:"
            parts.append(f"{text}\n\n{_table('', GenerationKwargs.model_fields)}")
            text = "And its `structured_outputs` is a mapping with one of these:"
            parts.append(f"{text}\n\n{_table('', StructuredOutputs.model_fields)}")
    parts.append(f"## Outside of the sections\n\n{_table('', {name: fields[name] for name in keys.top_level})}")
    renamed = "\n".join(f"| `{trl}` | `{ours}` |" for trl, ours in RENAMED.items() if ours.rpartition(".")[2] != trl)
    text = (
        "Accepted as flat names in run files, overrides and Python, as are all names that occur in only one section.\n"
        "[trl.md](trl.md) has all other fields of TRL's `GRPOConfig`: what they become here, and why a few are errors."
    )
    parts.append(f"## Names of TRL\n\n{text}\n\n| TRL | rankup |\n|---|---|\n{renamed}\n")
    return "\n".join(parts)


def _table(section: str, fields: dict[str, FieldInfo]) -> str:
    rows = ["| option | type | default | description |", "|---|---|---|---|"]
    for name, field in fields.items():
        kind = _escape(" or ".join(dict.fromkeys(_types(field.annotation))))
        default = _default(field, is_derived=name in DERIVED_DEFAULTS.get(section, ()))
        description = _escape(_one_line(field.description).replace("None:", "null:"))
        rows.append(f"| `{field.alias or name}` | {kind} | {default} | {description} |")
    return "\n".join(rows) + "\n"


def _types(annotation: Any) -> Iterator[str]:
    """The types that an annotation allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types(arguments[0])
    elif origin is Literal:
        yield from (f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in arguments)
    elif origin is list:
        yield "list of " + " or ".join(dict.fromkeys(_types(arguments[0])))
    elif annotation is type(None):
        yield "null"
    elif origin is dict:
        yield "mapping"
    elif origin is Callable:
        yield "function"
    elif arguments:  # a union
        for argument in arguments:
            yield from _types(argument)
    else:
        words = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
        yield "mapping" if isinstance(annotation, type) and issubclass(annotation, Section) else words[annotation]


def _default(field: FieldInfo, *, is_derived: bool) -> str:
    value = field.get_default(call_default_factory=True)
    if is_derived or value is None:
        return "null"
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        return "`{}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _escape(text: str) -> str:
    """Text for a cell of a table, in which a bar would start another cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
