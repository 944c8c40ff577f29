"""One environment: the members of a user's instance, and checks of what they return.

    world = World.of(Guess(), name=None, shown="Guess")
    outcome = caller.call(world.reset, world.reset_arguments(row, seed), seed=seed).result()
    observation_of(outcome.value, "reset of Guess")         # a text, messages, or None
    caller.call(world.is_done, {}, inline=True).result()    # users' code too: `done` may be a property or a method
    rewards_of(0.5, "Guess")                                # {"Guess": 0.5}

Only `reset` is required. Public methods are tools, except those of `MEMBERS`; properties are not evaluated in the search.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rewards.contract import copied, is_async
from ...rewards.texts import content_text, shorten
from .calls import encodable
from .tools import DEEPEST, Tool, is_deep, make_tool, make_tools

MEMBERS = ("reset", "respond", "done", "get_reward", "tools", "close", "seed")
"""Names with a meaning here or in other libraries: never tools."""

COLUMN = "environment"
"""The column of the data that names a row's environment, if there are several."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """One instance, which belongs to one open episode at a time.

    Attributes:
        instance: the user's object, as reward functions get it in `environments`.
        name: of its environment, if there are several; else None.
        class_name: under which its reward is logged.
        methods: its public methods, as tools.
        reset: begins an episode.
        respond: answers a turn without a tool call; None: it has no such method.
        get_reward: scores an episode that has ended; None: it has no such method.
        close: called when it is not used again; None: it has no such method.
    """

    instance: object
    name: str | None
    class_name: str
    methods: tuple[Tool, ...]
    reset: Callable[..., Any]
    respond: Callable[..., Any] | None
    get_reward: Callable[..., Any] | None
    close: Callable[..., Any] | None

    @staticmethod
    def of(instance: object, name: str | None, shown: str, *, like: World | None = None) -> World:
        """The world of an instance. Runs users' code, such as `__getattr__`: call it through a `Caller`.

        Args:
            shown: the environment in messages.
            like: another one, whose tools need not be examined again if its class is the same.

        Raises:
            ValueError: it has no `reset`, or a member that cannot be used.
        """
        kind = type(instance).__name__
        if inspect.isclass(instance) or not callable(getattr(instance, "reset", None)):
            what = f"the class {instance.__name__}" if inspect.isclass(instance) else f"an instance of {kind}"
            raise ValueError(f"environment {shown}: got {what}, which has no method `reset`; it begins an episode")
        for member in ("done", "tools"):
            if is_async(inspect.getattr_static(instance, member, None)):  # pyright: ignore[reportArgumentType]
                raise ValueError(f"environment {shown}: `{member}` of {kind} must not be async")
        methods = like.methods if like is not None and type(like.instance) is type(instance) else None
        world = World(
            instance=instance,
            name=name,
            class_name=kind,
            methods=_methods(instance, shown) if methods is None else _bound(methods, instance),
            reset=instance.reset,  # pyright: ignore[reportAttributeAccessIssue]
            respond=_member(instance, "respond"),
            get_reward=_member(instance, "get_reward"),
            close=_member(instance, "close"),
        )
        if world.respond is not None:
            world.respond_arguments("")
        return world

    def reset_arguments(self, row: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
        """The arguments of `reset`: the columns of a row that it names, or all if it has `**kwargs`; and `seed` likewise.

        A column `seed` of the data comes first. Lists and mappings are copies: an episode may change them.

        Raises:
            ValueError: it requires what is not a column.
        """
        available = {"seed": seed, **_columns(self, row)}
        missing = _missing_arguments(self.reset, available)
        if missing:
            columns = ", ".join(row) or "none"
            raise ValueError(
                f"reset of {self.class_name} requires {missing[0]!r}, which is not a column of the data (columns: {columns})"
            )
        return {key: copied(value) for key, value in available.items() if _takes(self.reset, key)}

    def respond_arguments(self, text: str) -> dict[str, str]:
        """The argument of `respond`, by its name. Raises ValueError if it does not take exactly one."""
        assert self.respond is not None
        kinds = inspect.Parameter
        parameters = _parameters(self.respond)
        required = [one for one in parameters if one.default is one.empty and one.kind not in _SEVERAL]
        named = [one for one in parameters if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        takes_any = any(one.kind is kinds.VAR_KEYWORD for one in parameters)
        if len(required) > 1 or not (named or takes_any) or any(one.kind is kinds.POSITIONAL_ONLY for one in required):
            raise ValueError(f"`respond` of {self.class_name} must take one argument, the text: def respond(self, text)")
        return {(required or named)[0].name if named else "text": text}

    def tools(self, extra: Sequence[Tool] = ()) -> list[Tool]:
        """Tools that belong to no environment, public methods, and what `tools` of the instance holds now, in this order.

        Runs users' code, after `reset`: call it through a `Caller`.

        Raises:
            ValueError: one of them is no tool, or two have one name. And what the user's code raises.
        """
        found = self._evaluated("tools")
        if found is None:
            found = ()
        if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
            raise ValueError(f"`tools` of {self.class_name} must be a list of tools (got {shorten(repr(found), 60)})")
        return make_tools([*extra, *self.methods, *found])

    def is_done(self) -> bool:
        """Whether the episode is over, without another turn. Runs users' code: call it through a `Caller`, inline."""
        return bool(self._evaluated("done"))

    def _evaluated(self, member: str) -> Any:
        """An attribute, a property, or what a method returns; None if there is none."""
        has_it = inspect.getattr_static(self.instance, member, None) is not None or hasattr(self.instance, member)
        value = getattr(self.instance, member) if has_it else None
        value = value() if callable(value) else value
        if inspect.isawaitable(value):
            raise ValueError(f"`{member}` of {self.class_name} must not be async")
        return value


def observation_of(value: object, where: str) -> str | list[dict[str, Any]] | None:
    """What `reset` or `respond` returned: a text, messages, or None.

    The parts of a message's content, which have no role, become a text. An empty list is None. Messages hold only what JSON
    has, as all that is rendered and recorded.

    Args:
        where: what returned it, for messages.

    Raises:
        ValueError: it is something else.
    """
    if value is None or isinstance(value, str):
        return None if value is None else encodable(value)
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages):
        if not messages:
            return None
        if all(isinstance(one.get("role"), str) for one in messages):
            return _plain_messages(messages, where)
        if all("role" not in one and isinstance(one.get("text"), str) for one in messages):
            return encodable(content_text(messages))
    shown = shorten(repr(value), 80)
    raise ValueError(f"{where} returned {shown} ({type(value).__name__}): return text, a list of messages, or None")


def _plain_messages(messages: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Copies. Raises ValueError if a content is neither text nor parts, or a message holds what JSON does not have."""
    wrong = [one["content"] for one in messages if not isinstance(one.get("content"), str | list | None)]
    if wrong:
        shown = shorten(repr(wrong[0]), 80)
        raise ValueError(f"{where} returned a message with the content {shown} ({type(wrong[0]).__name__}): it must be text")
    if is_deep(messages):
        raise ValueError(f"{where} returned messages that are nested more than {DEEPEST} times")
    try:
        return json.loads(encodable(json.dumps([dict(one) for one in messages], ensure_ascii=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} returned a message that cannot be written as JSON: {error}") from error


def rewards_of(value: object, class_name: str) -> dict[str, float | None]:
    """What `get_reward` returned, by the names under which it is logged.

    A number has the name of the class, as in TRL. A dictionary has names of its own, which are logged as `rewards/<name>/mean`.
    None: not scored.

    Raises:
        ValueError: it is something else, or not finite.
    """
    named = value if isinstance(value, Mapping) else {class_name: value}
    wrong = [name for name in named if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"`get_reward` of {class_name} returned a reward with the name {wrong[0]!r}: names must be text")
    return {str(name): None if one is None else _number(one, class_name) for name, one in named.items()}


def _number(value: Any, class_name: str) -> float:
    number = math.nan
    if not isinstance(value, str | bytes):  # float("1") would pass, and hide a mistake
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of many elements
            pass
    if not math.isfinite(number):
        raise ValueError(
            f"`get_reward` of {class_name} returned {shorten(repr(value), 60)} ({type(value).__name__}): return a finite "
            "number, a dictionary of named ones, or None where it does not apply"
        )
    return number


def _methods(instance: object, shown: str) -> tuple[Tool, ...]:
    names = [name for name, member in inspect.getmembers_static(type(instance)) if _is_tool(name, member)]
    try:
        return tuple(make_tool(getattr(instance, name), name=name) for name in names)
    except ValueError as error:
        raise ValueError(
            f"environment {shown}: public methods of {type(instance).__name__} are tools (the name of a method that the model "
            f"must not call begins with '_'): {error}"
        ) from error


def _bound(methods: Iterable[Tool], instance: object) -> tuple[Tool, ...]:
    return tuple(tool.bound_to(getattr(instance, tool.name)) for tool in methods)


def _is_tool(name: str, member: object) -> bool:
    """Whether a member of a class is a public method, written in Python: also static ones, class methods and decorated ones."""
    if name.startswith("_") or name in MEMBERS:
        return False
    if isinstance(member, functools.partialmethod):
        return True
    if not isinstance(member, staticmethod | classmethod) and not (callable(member) and inspect.isroutine(member)):
        return False  # not a property, nor another descriptor that computes a value
    return inspect.isfunction(inspect.unwrap(member))  # pyright: ignore[reportArgumentType]


def _member(instance: object, name: str) -> Callable[..., Any] | None:
    member = getattr(instance, name, None)
    return member if callable(member) else None


def _columns(world: World, row: Mapping[str, Any]) -> dict[str, Any]:
    """What `reset` may get of a row: the name of the environment is for the trainer."""
    return {key: value for key, value in row.items() if world.name is None or key != COLUMN}


_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some callables written in C have no signature
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _missing_arguments(function: Callable[..., Any], available: Mapping[str, Any]) -> list[str]:
    required = [one for one in _parameters(function) if one.default is one.empty and one.kind not in _SEVERAL]
    return [one.name for one in required if one.name not in available or one.kind is one.POSITIONAL_ONLY]


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = _parameters(function)
    named = {one.name for one in parameters if one.kind not in (*_SEVERAL, inspect.Parameter.POSITIONAL_ONLY)}
    return name in named or any(one.kind is one.VAR_KEYWORD for one in parameters)
