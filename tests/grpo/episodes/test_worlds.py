"""A user's instance: how its members are found and called, and what they may return."""

import functools
import math
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sample_environments import FIND, LONG, Guess, find, value

from rankup.grpo.episodes.calls import Caller
from rankup.grpo.episodes.environments import Environments
from rankup.grpo.episodes.tools import make_tool
from rankup.grpo.episodes.worlds import MEMBERS, World, observation_of, rewards_of


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller(LONG)
    yield caller
    caller.close()


TOOLS = ["ask", "hint", "inherited", "most", "rules"]


def test_public_methods_are_tools_and_nothing_else_is(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    assert [tool.name for tool in environments.tools(None)] == TOOLS
    assert not set(TOOLS) & set(MEMBERS)
    world = environments.acquire(None)
    tools = {tool.name: tool for tool in value(caller, world.tools)}
    results = [
        value(caller, tools[name].function, {"kind": "a hint"} if name == "hint" else {})
        for name in ("hint", *TOOLS[2:], "ask")
    ]
    assert results == ["a hint after 0", "inherited", 5, "rules", "asked"]
    assert tools["ask"].is_async


def test_a_method_belongs_to_its_instance(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    first, second = environments.acquire(None), environments.acquire(None)
    first.instance.tried = 3  # pyright: ignore[reportAttributeAccessIssue]
    texts = [value(caller, world.tools()[1].function, {"kind": "x"}) for world in (first, second)]
    assert texts == ["x after 3", "x after 0"]


def test_a_method_that_the_model_could_not_call_is_refused_at_the_start(caller: Caller) -> None:
    class Helpful(Guess):
        def helper(self, x) -> None:
            pass

    with pytest.raises(
        ValueError, match=r"environment Helpful: public methods of Helpful.*begins with '_'.*tool helper:.*docstring"
    ):
        Environments(Helpful, caller)


@pytest.mark.parametrize("tool", [find, FIND])
@pytest.mark.parametrize("kind", ["attribute", "property", "method"])
def test_tools_that_are_known_at_run_time_only(caller: Caller, tool: Any, kind: str) -> None:
    class Dynamic:
        def reset(self) -> None:
            if kind == "attribute":
                self.tools = (tool,)

        def look(self) -> str:
            """Look."""
            return "looked"

    if kind != "attribute":
        Dynamic.tools = property(lambda self: [tool]) if kind == "property" else lambda self: [tool]  # pyright: ignore
    environments = Environments(Dynamic, caller)
    extra = [make_tool(("now", "Time.", {}, lambda: "12:00"))]
    assert [one.name for one in environments.tools(None, extra)] == ["now", "look"]
    world = environments.acquire(None)
    value(caller, world.reset)
    found = value(caller, world.tools, {"extra": extra})
    assert [one.name for one in found] == ["now", "look", "find"]
    assert value(caller, found[-1].function, {"query": "x"}) == "x"


@pytest.mark.parametrize(
    ("reset", "row", "expected"),
    [
        (lambda seed: None, {"prompt": "p", "x": [1]}, {"seed": 7}),
        (lambda: None, {"prompt": "p"}, {}),
        (lambda prompt, x=None: None, {"prompt": "p", "x": [1], "y": 2}, {"prompt": "p", "x": [1]}),
        (lambda **row: None, {"prompt": "p", "x": [1]}, {"prompt": "p", "x": [1], "seed": 7}),
        (lambda seed, **row: None, {"prompt": "p"}, {"prompt": "p", "seed": 7}),
        (lambda *args, x: None, {"x": 1, "y": 2}, {"x": 1}),
        (lambda seed: None, {"seed": 3}, {"seed": 3}),
    ],
)
def test_reset_gets_the_seed_and_the_columns_that_it_takes(reset: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    world = World.of(types.SimpleNamespace(reset=reset), None, "test")
    arguments = world.reset_arguments(row, 7)
    assert arguments == expected
    reset(**arguments)


def test_an_episode_may_change_its_arguments(caller: Caller) -> None:
    world = World.of(types.SimpleNamespace(reset=lambda cards: cards["hand"].pop()), None, "test")
    row = {"cards": {"hand": [1, 2]}}
    assert [value(caller, world.reset, world.reset_arguments(row, 0)) for _ in range(2)] == [2, 2]
    assert row == {"cards": {"hand": [1, 2]}}


@pytest.mark.parametrize("done", [True, False, np.True_, np.False_, None, 0, 1])
def test_done_may_be_an_attribute_a_property_or_a_method(caller: Caller, done: Any) -> None:
    class Attribute:
        def reset(self) -> None:
            self.done = done

    class Property(Attribute):
        done = property(lambda self: done, lambda self, value: None)  # pyright: ignore[reportAssignmentType]

    class Method:
        def reset(self) -> None: ...

        def done(self) -> Any:
            return done

    for kind in (Attribute, Property, Method):
        world = World.of(kind(), None, "test")
        if kind is Attribute:
            assert value(caller, world.is_done) is False  # it does not exist before `reset`
        value(caller, world.reset)
        assert value(caller, world.is_done, inline=True) is bool(done)
        assert world.methods == ()


def test_an_error_inside_the_property_done_is_the_outcome(caller: Caller) -> None:
    class Broken:
        def reset(self) -> None: ...

        @property
        def done(self) -> bool:
            return self.missing  # pyright: ignore[reportAttributeAccessIssue]

    outcome = caller.call(World.of(Broken(), None, "test").is_done, {}).result()
    assert isinstance(outcome.error, AttributeError)


def test_members_of_an_object_that_passes_everything_on_are_found(caller: Caller) -> None:
    class Proxy:
        def __init__(self) -> None:
            self._inner = Guess()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["_inner"], name)

    world = World.of(Proxy(), None, "test")
    assert world.respond is not None and world.get_reward is not None and not value(caller, world.is_done)
    world.instance._inner.tried = 5  # pyright: ignore[reportAttributeAccessIssue]
    assert value(caller, world.is_done)


@pytest.mark.parametrize("tools", ["find", {"find": find}, 7, [7], [find, find], [FIND[:3]]])
def test_tools_that_are_none_are_the_environments_failure(caller: Caller, tools: Any) -> None:
    world = World.of(types.SimpleNamespace(reset=lambda: None, tools=tools), None, "test")
    assert isinstance(caller.call(world.tools, {}).result().error, ValueError)


@pytest.mark.parametrize(
    ("respond", "arguments"),
    [
        (lambda text: None, {"text": "t"}),
        (lambda message, style="short": None, {"message": "t"}),
        (lambda *, action: None, {"action": "t"}),
        (lambda **kwargs: None, {"text": "t"}),
    ],
)
def test_respond_gets_the_text_by_the_name_of_its_argument(respond: Any, arguments: dict[str, str]) -> None:
    world = World.of(types.SimpleNamespace(reset=lambda: None, respond=respond), None, "test")
    assert world.respond_arguments("t") == arguments


@pytest.mark.parametrize("respond", [lambda: None, lambda a, b: None, lambda text, /: None, lambda *texts: None])
def test_a_respond_that_cannot_take_the_text_is_refused_at_the_start(respond: Any) -> None:
    with pytest.raises(ValueError, match=r"respond.*one argument"):
        World.of(types.SimpleNamespace(reset=lambda: None, respond=respond), None, "test")


def test_a_single_environment_gets_the_column_environment(caller: Caller) -> None:
    world = World.of(types.SimpleNamespace(reset=lambda environment: environment), None, "test")
    assert value(caller, world.reset, world.reset_arguments({"environment": "desert"}, 0)) == "desert"
    assert Environments(Guess, caller).name_of({"environment": "desert"}) is None


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, None),
        ([], None),
        ("", ""),
        ("up\ud800", "up?"),
        ([{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}]),
        ({"role": "user", "content": "a"}, [{"role": "user", "content": "a"}]),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_what_reset_and_respond_may_return(returned: Any, expected: Any) -> None:
    assert observation_of(returned, "reset of Guess") == expected


@pytest.mark.parametrize(
    "returned", [3, b"a", ("text", {}), ["a"], [{"content": "a"}], [{"role": 1}], {"observation": "a"}, [None]]
)
def test_other_observations_are_errors_that_say_what_to_return(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"respond of Guess returned .*return text, a list of messages, or None"):
        observation_of(returned, "respond of Guess")


def test_messages_are_copies() -> None:
    given = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    observed = observation_of(given, "reset")
    given[0]["content"][0]["text"] = "b"  # pyright: ignore
    assert observed == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (0.5, {"Guess": 0.5}),
        (True, {"Guess": 1.0}),
        (np.float32(2), {"Guess": 2.0}),
        (None, {"Guess": None}),
        ({"won": 1, "tries": None}, {"won": 1.0, "tries": None}),
        ({}, {}),
    ],
)
def test_check_13_none_is_not_zero_and_rewards_may_have_names(returned: Any, expected: dict[str, float | None]) -> None:
    assert rewards_of(returned, "Guess") == expected


@pytest.mark.parametrize(
    "returned", ["1", math.nan, math.inf, [1.0, 2.0], np.zeros(2), {"won": "1"}, {3: 1.0}, object(), 10**400]
)
def test_other_rewards_are_errors(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"get_reward.* of Guess returned"):
        rewards_of(returned, "Guess")


def nested(levels: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(levels), [])


@pytest.mark.parametrize(
    "more",
    [{"content": 5}, {"content": ("a",)}, {"meta": {(1, 2): 3}}, {"meta": object()}, {"meta": nested(500)}],
)
def test_messages_hold_only_what_can_be_rendered_and_recorded(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="respond of Guess returned"):
        observation_of([{"role": "user", "content": "hot", **more}], "respond of Guess")


def test_halves_of_surrogate_pairs_in_messages_are_replaced() -> None:
    assert observation_of([{"role": "user", "content": "a\ud800"}], "reset") == [{"role": "user", "content": "a?"}]
