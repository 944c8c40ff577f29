"""Tools: functions that the model may call, with the JSON schema that it sees.

    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        \"\"\"
        return a + b

    tool = make_tool(add)
    tool.schema["function"]["parameters"]["required"]       # ["a", "b"]
    tool.problem({"a": 1})                                  # wrong arguments: 'b' is a required property; add takes ...
    tool.problem({"a": 1, "b": 2})                          # None: caller.call(tool.function, {"a": 1, "b": 2})

A function, a method, a `functools.partial` or an object with `__call__` needs type hints and a docstring in Google's style, as
for transformers' `get_json_schema`. What is known at run time only is a tuple (name, description, JSON schema, function).
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable
from transformers.utils.chat_template_utils import get_json_schema

from ...rewards.contract import is_async
from ...rewards.loading import load_object, reward_name
from ...rewards.texts import describe, did_you_mean, shorten

EXAMPLE = '''
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
'''

_NAME = re.compile(r"[\w./:-]+")
_LONGEST_PROBLEM = 200
"""Characters of a validation error: it quotes what the model wrote, which may be long."""


DEEPEST = 100
"""Levels of arguments and messages: far below what Python's recursion allows to those that copy, validate and record them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """See the module's docstring.

    Attributes:
        name: by which the model calls it.
        schema: in OpenAI's form, `{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`.
        function: called with the arguments by name.
        validator: of the arguments.
    """

    name: str
    schema: Mapping[str, Any]
    function: Callable[..., Any]
    validator: Any

    @property
    def is_async(self) -> bool:
        """Whether calling it returns an awaitable."""
        return is_async(self.function)

    def problem(self, arguments: object) -> str | None:
        """What is wrong with the arguments of a call, as a sentence for the model that names the parameters; None: nothing."""
        if is_deep(arguments):
            found = f"arguments must not be nested more than {DEEPEST} times"
        elif not isinstance(arguments, Mapping):
            found = "arguments must be an object with the names of the parameters"
        else:
            found = self._violation(arguments)
        return None if found is None else f"wrong arguments: {found}; {self._signature()}"

    def _violation(self, arguments: Mapping[Any, Any]) -> str | None:
        try:
            error = best_match(self.validator.iter_errors(dict(arguments)))
        except (Unresolvable, ArithmeticError, ValueError, RecursionError):
            # The schema refers to what it does not contain, or to itself; or no number is a multiple of infinity: the function
            # has to judge.
            error = None
        if error is not None:
            where = "" if not error.absolute_path else f"{error.json_path.removeprefix('$.')}: "
            return where + shorten(error.message, _LONGEST_PROBLEM)
        try:
            inspect.signature(self.function).bind(**{str(name): value for name, value in arguments.items()})
        except TypeError as error:
            return str(error)
        except ValueError:  # some callables written in C have no signature
            pass
        return None

    def _signature(self) -> str:
        parameters = self.schema["function"]["parameters"]
        required = parameters.get("required", ())
        shown = [
            f"{name} ({_type_text(one)}{'' if name in required else ', optional'})"
            for name, one in parameters["properties"].items()
        ]
        return f"{self.name} takes {', '.join(shown) or 'no arguments'}"

    def bound_to(self, function: Callable[..., Any]) -> Tool:
        """The same tool with another function: the method of another instance."""
        return Tool(name=self.name, schema=self.schema, function=function, validator=self.validator)


ToolSpec = Tool | Callable[..., Any] | tuple[str, str, Mapping[str, Any], Callable[..., Any]]
"""A tool, a function, or (name, description, JSON schema of the arguments, function)."""


def make_tool(given: ToolSpec, *, name: str | None = None) -> Tool:
    """The tool of a function or a tuple.

    Args:
        name: of a function; None: its own.

    Raises:
        ValueError: the model could not call it; the message says what to write.
    """
    if isinstance(given, Tool):
        return given
    if isinstance(given, tuple | list):
        return _described(given)
    if inspect.isclass(given) or not callable(given):
        kind = f"the class {given.__name__}" if inspect.isclass(given) else f"{given!r} ({type(given).__name__})"
        raise ValueError(f"a tool must be a function, or (name, description, JSON schema, function): got {kind}")
    name = _checked_name(reward_name(given) if name is None else name)
    plain, takes_more = _with_visible_parameters(name, given)
    try:
        schema = get_json_schema(plain)
    except Exception as error:  # hints and docstrings are the user's: anything may be raised
        raise ValueError(
            f"tool {name}: {describe(error)}. A tool needs type hints, and a docstring that describes each argument:\n{EXAMPLE}"
        ) from error
    parameters = schema["function"]["parameters"]
    return Tool(name=name, schema=schema, function=given, validator=_validator(name, parameters, takes_more=takes_more))


def make_tools(given: Iterable[ToolSpec]) -> list[Tool]:
    """The tools of several functions. Raises ValueError as `make_tool` does, and for two tools of one name."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"tools must be a list of functions: got {shorten(repr(given), 80)} ({type(given).__name__})")
    tools = [make_tool(one) for one in given]
    seen: dict[str, Tool] = {}
    for tool in tools:
        other = seen.setdefault(tool.name, tool)
        if other is not tool:
            raise ValueError(
                f"two tools are called {tool.name!r} ({_where(other.function)} and {_where(tool.function)}): rename one of them"
            )
    return tools


def load_tools(names: Sequence[str]) -> list[Tool]:
    """The tools of a run file, by `file.py:name` or `package.module:name`.

    Raises:
        ValueError: as for `make_tools`, or a name cannot be loaded.
        FileNotFoundError: no such file.
    """
    loaded = []
    for name in names:
        try:
            loaded.append(make_tool(load_object(name)))  # pyright: ignore[reportArgumentType]  # it checks what was found
        except ValueError as error:
            raise ValueError(f"rollout.tools: {name}: {error}") from error
    return make_tools(loaded)


def unknown_tool(name: str | None, tools: Sequence[Tool]) -> str:
    """The sentence for a model that called a tool that does not exist, or none."""
    names = [tool.name for tool in tools]
    there_are = f"the tools are {', '.join(names)}" if names else "there are no tools"
    if not name:
        return f"the call names no tool: {there_are}"
    hint = did_you_mean(name, names)
    return f"no tool is called {shorten(repr(name), 80)}: {f'{hint} ' if hint else ''}{there_are}"


def _described(given: Sequence[Any]) -> Tool:
    """The tool of (name, description, JSON schema, function)."""
    if len(given) != 4:
        raise ValueError(f"a tool must be a function, or (name, description, JSON schema, function): got {len(given)} values")
    name, description, parameters, function = given
    name = _checked_name(name)
    if not isinstance(description, str):
        raise ValueError(f"tool {name}: its description must be text (got {description!r})")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f"tool {name}: the JSON schema of its arguments must be one of an object (got {parameters!r})")
    if not callable(function):
        raise ValueError(f"tool {name}: its function cannot be called (got {function!r})")
    parameters = {"type": "object", "properties": {}, **parameters}
    validator = _validator(name, parameters, takes_more=True)
    _check_that_it_takes(name, function, parameters)
    schema = {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    return Tool(name=name, schema=schema, function=function, validator=validator)


def _check_that_it_takes(name: str, function: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
    """Raise ValueError if the function cannot be called with the properties of the schema."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C have no signature
        return
    try:
        signature.bind(**dict.fromkeys(parameters["properties"]))
    except TypeError as error:
        properties = ", ".join(parameters["properties"]) or "no arguments"
        raise ValueError(f"tool {name}: its JSON schema has {properties}, which its function does not take: {error}") from error


def _checked_name(name: object) -> str:
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ValueError(f"a tool needs a name of letters, digits, '_' and '-', by which the model calls it (got {name!r})")


def _with_visible_parameters(name: str, function: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """A function with the name, the docstring and the parameters that the model sees; and whether any others are taken.

    What a partial has fixed is not seen. `get_json_schema` takes neither partials nor objects.
    """
    inner, fixed = function, set[str]()
    while isinstance(inner, functools.partial):
        fixed |= set(inner.keywords)
        inner = inner.func
    is_object = not inspect.isroutine(inner)
    doc = inspect.getdoc(inner) if not is_object else type(inner).__call__.__doc__ or type(inner).__doc__
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(type(inner).__call__ if is_object else inner)
    except Exception as error:  # names in the hints that do not exist, and whatever evaluating them raises
        raise ValueError(f"tool {name}: its type hints cannot be read: {describe(error)}") from error
    kinds = inspect.Parameter
    several = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    visible = [one for one in signature.parameters.values() if one.kind not in several and one.name not in fixed]
    unnamed = [one.name for one in visible if one.kind is kinds.POSITIONAL_ONLY]
    if unnamed:
        raise ValueError(f"tool {name}: arguments are given by name, but {unnamed[0]!r} is positional-only: remove the '/'")

    def plain() -> None: ...

    plain.__name__, plain.__doc__ = name, doc
    plain.__signature__ = signature.replace(parameters=visible)  # pyright: ignore[reportFunctionMemberAccess]
    seen = {one.name for one in visible} | {"return"}
    plain.__annotations__ = {key: hint for key, hint in hints.items() if key in seen}
    takes_more = any(one.kind is kinds.VAR_KEYWORD for one in signature.parameters.values()) and not fixed
    return plain, takes_more


def _validator(name: str, parameters: Mapping[str, Any], *, takes_more: bool) -> Any:
    """What validates arguments. References to other documents are not followed. Raises ValueError if it is no JSON schema."""
    schema = _with_nulls(parameters)
    if not takes_more:
        schema = {"additionalProperties": False, **schema}
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = error.json_path.removeprefix("$.")
        raise ValueError(f"tool {name}: not a JSON schema that a model can follow: {where}: {error.message}") from error
    return kind(schema, registry=referencing.Registry())


def _with_nulls(schema: Any) -> Any:
    """The schema with `null` among the types where it has OpenAPI's `nullable`, which JSON schema does not know."""
    if isinstance(schema, list | tuple):
        return [_with_nulls(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed = {key: _with_nulls(value) for key, value in schema.items()}
    if changed.get("nullable") is not True:
        return changed
    del changed["nullable"]
    return {"anyOf": [changed, {"type": "null"}]}


def is_deep(value: object) -> bool:
    """Whether lists and mappings are nested more than `DEEPEST` times."""
    level = [value]
    for _ in range(DEEPEST + 1):
        within = [one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, Mapping | list)]
        level = [item for items in within for item in items]
    return bool(level)


def _type_text(schema: object) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if "enum" in schema:
        return shorten("one of " + ", ".join(json.dumps(one, ensure_ascii=False, default=str) for one in schema["enum"]), 80)
    kind = schema.get("type", "any")
    return kind if isinstance(kind, str) else " or ".join(map(str, kind))


def _where(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    defined = function if hasattr(function, "__qualname__") else type(function)
    return f"{defined.__module__}.{defined.__qualname__}"
