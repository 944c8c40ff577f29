"""Options that take a function: its spec in a run file, in Python also the function itself.

    config = GRPOConfig(loss_type="losses.py:mine")                 # in a run file too
    config = GRPOConfig(loss_type=mine)
    loss = load_function("algorithm.loss_type", config.algorithm.loss_type)
    text = text_of(mine)                                            # "losses:mine"

A configuration is also text: in `config.yaml`, in checkpoints, in trackers. There a function is its spec, by which it loads
again. A lambda, a function inside of another, or one of a notebook or script has none: its text, `<function mine in __main__>`,
can be read and compared, but a run that needs the function does not start from it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from ...rewards.loading import load_object, spec_of

_SPEC = re.compile(r".+:[A-Za-z_]\w*")
_WITHOUT_SPEC = re.compile(r"<.+ in .+>")


def text_of(function: str | Callable[..., Any]) -> str:
    """The text of a function in files and messages: its spec, or a description in angle brackets if it has none."""
    if isinstance(function, str):
        return function
    spec = spec_of(function)
    if spec is not None:
        return spec
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    has_name = hasattr(inner, "__qualname__")
    kind = "partial" if inner is not function else "function" if has_name else "object"
    name = inner.__qualname__ if has_name else type(inner).__qualname__
    return f"<{kind} {name} in {inner.__module__}>"


def load_function(option: str, function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that is the value of `option`, or that its spec names.

    Raises:
        ValueError: the spec is malformed, its module has no such name or raises an error, the object is no function, or the
            text is that of a function without a spec.
        FileNotFoundError: no such file.
    """
    if not isinstance(function, str):
        return function
    if _WITHOUT_SPEC.fullmatch(function):
        raise ValueError(
            f"{option}: {function} was passed in Python, and no file holds it under a name: pass it in Python again, or write "
            "it into a file and name it as path/to/file.py:name"
        )
    found = load_object(function)
    if inspect.isclass(found):
        raise ValueError(f"{option}: {function} is a class: name a function, or an instance that can be called")
    if not callable(found):
        raise ValueError(f"{option}: {function} is not a function")
    return found


def check_name_or_spec(value: str | Callable[..., Any], names: Iterable[str] = ()) -> None:
    """Check that a text is one of the names, or can be a function's.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str) or value in names or _SPEC.fullmatch(value) or _WITHOUT_SPEC.fullmatch(value):
        return
    choice = ", ".join([*names, "or "]) if names else ""
    raise ValueError(f"must be {choice}your own function, path/to/file.py:name (got {value!r})")


def _check_type(value: object) -> object:
    if inspect.isclass(value):
        raise ValueError(f"must be a function or an instance that can be called (got the class {value.__name__})")
    if isinstance(value, str) or callable(value):
        return value
    raise ValueError(f"must be a function, or text such as path/to/file.py:name (got {value!r})")


UserFunction = Annotated[
    str | Callable[..., Any],
    BeforeValidator(_check_type),
    PlainSerializer(text_of, return_type=str, when_used="json"),
]
"""The type of an option that takes a function or its spec. In JSON and YAML it is text."""
