"""What a user may give as a tool, what the model sees of it, and what it is told about its arguments."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import get_json_schema

from rankup.grpo.episodes.tools import DEEPEST, Tool, load_tools, make_tool, make_tools, unknown_tool


def add(a: int, b: int = 0) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


class Shop:
    def price(self, item: Literal["tea", "milk"], amount: int | None = None) -> float:
        """The price of an item.

        Args:
            item: What to buy.
            amount: How many.
        """
        return 1.0

    def __call__(self, item: str) -> str:
        """Buy something.

        Args:
            item: What to buy.
        """
        return item

    async def order(self, item: str) -> str:
        """Order something.

        Args:
            item: What to order.
        """
        return item


SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


def parameters(tool: Tool) -> dict[str, Any]:
    return tool.schema["function"]["parameters"]


def test_a_function_has_the_schema_of_transformers() -> None:
    tool = make_tool(add)
    assert tool.schema == get_json_schema(add)
    assert (tool.name, tool.function, tool.is_async) == ("add", add, False)
    assert make_tool(tool) is tool


def test_methods_objects_and_partials_are_tools() -> None:
    shop = Shop()
    assert make_tool(shop.price).schema == get_json_schema(shop.price)
    assert make_tool(shop.order).is_async and make_tool(functools.partial(shop.order)).is_async
    called = make_tool(shop)
    assert called.name == "Shop" and parameters(called)["required"] == ["item"]
    assert called.schema["function"]["description"] == "Buy something."


def test_a_static_and_a_decorated_function_are_tools() -> None:
    @functools.wraps(add)
    def counted(*args: Any, **kwargs: Any) -> int:
        return add(*args, **kwargs)

    for function in (counted, functools.cache(add), functools.lru_cache(add)):
        assert parameters(make_tool(function)) == parameters(make_tool(add))


def test_the_model_does_not_see_what_a_partial_has_fixed() -> None:
    by_name, by_place = make_tool(functools.partial(add, b=3)), make_tool(functools.partial(add, 3))
    assert list(parameters(by_name)["properties"]) == ["a"] and by_name.function(a=1) == 4
    assert list(parameters(by_place)["properties"]) == ["b"] and by_place.function(b=1) == 4
    assert by_name.problem({"a": 1, "b": 2}) is not None


def test_a_partial_of_a_function_that_takes_anything_keeps_what_it_has_fixed() -> None:
    def search(query: str, **options: str) -> str:
        """Search.

        Args:
            query: What for.
        """
        return query

    assert make_tool(search).problem({"query": "x", "site": "y"}) is None
    assert make_tool(functools.partial(search, folder="/safe")).problem({"query": "x", "folder": "/"}) is not None


def test_a_tuple_is_a_tool_with_its_own_schema() -> None:
    tool = make_tool(("find", "Find a page.", SCHEMA, lambda query: query))
    assert tool.schema == {
        "type": "function",
        "function": {"name": "find", "description": "Find a page.", "parameters": SCHEMA},
    }
    assert tool.problem({"query": "x"}) is None
    assert make_tool(("now", "The time.", {}, lambda: "12:00")).problem({}) is None


def undescribed(a: int) -> int:
    """Has no section of arguments."""
    return a


def untyped(a) -> int:
    """Add.

    Args:
        a: A number.
    """
    return a


def no_docstring(a: int) -> int:
    return a


def unknown_hint(a: "Missing") -> int:  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    """Add.

    Args:
        a: A number.
    """
    return a


def positional(a: int, /) -> int:
    """Add.

    Args:
        a: A number.
    """
    return a


def odd_choices(a: str) -> str:
    """Pick.

    Args:
        a: One of them (choices: [tea])
    """
    return a


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (undescribed, "docstring"),
        (untyped, "type hint"),
        (no_docstring, "docstring"),
        (unknown_hint, "Missing"),
        (positional, "'/'"),
        (odd_choices, "docstring"),
        (lambda a: a, "name"),
        (Shop, "class Shop"),
        (7, "int"),
        (None, "NoneType"),
        (("find", "Find.", SCHEMA), "3 values"),
        (("find it", "Find.", SCHEMA, add), "name"),
        (("", "Find.", SCHEMA, add), "name"),
        (("find", None, SCHEMA, add), "description"),
        (("find", "Find.", {"type": "array"}, add), "schema"),
        (("find", "Find.", {"properties": {"a": {"type": "text"}}}, add), "schema"),
        (("find", "Find.", {"properties": {"a": {"pattern": "("}}}, add), "schema"),
        (("find", "Find.", SCHEMA, "add"), "function"),
        (("find", "Find.", SCHEMA, add), "query"),
    ],
)
def test_what_the_model_could_not_call_is_refused_with_the_remedy(function: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="tool") as raised:
        make_tool(function)
    assert reason in str(raised.value)


def test_a_refused_function_is_shown_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"tool no_docstring:[\s\S]*Args:\n\s+a: The first number"):
        make_tool(no_docstring)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two tools are called 'add'.*test_tools\.add"):
        make_tools([add, ("add", "Add.", {}, lambda: 0)])
    assert [tool.name for tool in make_tools([add, Shop().price])] == ["add", "price"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "'a' is a required property"),
        ({"b": 1}, "'a' is a required property"),
        ({"a": "1"}, "a: '1' is not of type 'integer'"),
        ({"a": None}, "a: None is not of type 'integer'"),
        ({"a": 1, "c": 2}, "'c' was unexpected"),
        ({"a": 1, "": 2}, "'' was unexpected"),
        ([1, 2], "object"),
        (None, "object"),
        ("a=1", "object"),
        (1, "object"),
        ({"a": "x" * 100_000}, "is not of type"),
        ({"a": [[]] * 50_000}, "..."),
    ],
)
def test_check_11_wrong_arguments_are_one_sentence_that_names_the_parameters(arguments: Any, reason: str) -> None:
    problem = make_tool(add).problem(arguments)
    assert problem is not None
    assert reason in problem or (len(str(arguments)) > 1000 and "..." in problem)
    assert problem.endswith("add takes a (integer), b (integer, optional)")
    assert len(problem) < 400 and "\n" not in problem


@pytest.mark.parametrize("arguments", [{"a": 1}, {"a": 1, "b": 2}, {"b": 2, "a": -(10**30)}])
def test_right_arguments_have_no_problem(arguments: dict[str, int]) -> None:
    assert make_tool(add).problem(arguments) is None


def test_an_optional_argument_may_be_null_and_choices_are_checked() -> None:
    tool = make_tool(Shop().price)
    assert tool.problem({"item": "tea", "amount": None}) is None
    problem = tool.problem({"item": "coffee"})
    assert problem is not None and 'item (one of "tea", "milk")' in problem


def test_arguments_of_a_tuple_that_its_schema_allows_and_its_function_does_not_are_wrong() -> None:
    tool = make_tool(("find", "Find.", {"properties": {"query": {}}}, lambda query: query))
    assert tool.problem({"query": 1, "page": 2}) is not None  # the schema says nothing of `page`
    assert tool.problem({}) is not None  # nor that `query` is required


def test_a_schema_may_refer_to_its_own_definitions_and_nothing_else_is_fetched() -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "integer"}}}
    tool = make_tool(("f", "F.", schema, lambda x: x))
    assert tool.problem({"x": 1}) is None and tool.problem({"x": "1"}) is not None
    remote = make_tool(("f", "F.", {"properties": {"x": {"$ref": "http://127.0.0.1:9/x"}}}, lambda x: x))
    assert remote.problem({"x": 1}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(arguments=json_values | st.fixed_dictionaries({"a": json_values}, optional={"b": json_values, "c": json_values}))
def test_check_11_any_json_has_a_problem_or_can_be_called(arguments: Any) -> None:
    tool = make_tool(add)
    if tool.problem(arguments) is None:
        assert isinstance(tool.function(**arguments), int | float)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ad", "no tool is called 'ad': did you mean add? the tools are add, price"),
        ("xyz", "no tool is called 'xyz': the tools are add, price"),
        (None, "the call names no tool: the tools are add, price"),
        ("", "the call names no tool: the tools are add, price"),
    ],
)
def test_check_11_an_unknown_tool_is_answered_with_the_names(name: str | None, sentence: str) -> None:
    assert unknown_tool(name, make_tools([add, Shop().price])) == sentence
    assert unknown_tool("x", []) == "no tool is called 'x': there are no tools"
    assert len(unknown_tool("x" * 10_000, [])) < 200


def test_tools_of_a_run_file_are_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'def half(x: float) -> float:\n    """Half.\n\n    Args:\n        x: A number.\n    """\n    return x / 2\n'
    (tmp_path / "tools.py").write_text(code + "number = 7\n")
    monkeypatch.chdir(tmp_path)
    (tool,) = load_tools(["tools.py:half"])
    assert tool.name == "half" and tool.function(x=1.0) == 0.5
    for name, reason in [("tools.py:haf", "did you mean half"), ("tools.py:number", "int"), ("tools", "cannot read")]:
        with pytest.raises(ValueError, match=f"rollout.tools.*{reason}"):
            load_tools([name])
    with pytest.raises(ValueError, match="two tools"):
        load_tools(["tools.py:half", "tools.py:half"])
    with pytest.raises(FileNotFoundError):
        load_tools(["missing.py:half"])


def test_a_schema_is_json() -> None:
    given: list[Callable[..., Any]] = [add, Shop().price, Shop()]
    assert [json.loads(json.dumps(tool.schema)) for tool in make_tools(given)] == [tool.schema for tool in make_tools(given)]


@pytest.mark.parametrize(
    ("properties", "value"),
    [
        ({"x": {"$ref": "#/properties/x"}}, 1),
        ({"x": {"type": "number", "multipleOf": 0.1}}, math.inf),
        ({"x": {"type": "number", "multipleOf": 0.1}}, math.nan),
    ],
)
def test_what_a_schema_cannot_decide_is_left_to_the_function(properties: dict[str, Any], value: float) -> None:
    tool = make_tool(("pay", "Pay.", {"type": "object", "properties": properties}, lambda x: x))
    assert tool.problem({"x": value}) is None


@pytest.mark.parametrize("levels", [DEEPEST, 900, 10_000])
def test_check_11_arguments_that_are_nested_too_deeply_are_wrong(levels: int) -> None:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    tool = make_tool(("pay", "Pay.", {"type": "object", "properties": {"x": {}}}, lambda x: x))
    assert "nested more than" in str(tool.problem({"x": nested}))
    assert tool.problem({"x": [[[]]]}) is None


def test_a_tool_in_the_place_of_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="tools must be a list of functions"):
        make_tools(add)  # pyright: ignore[reportArgumentType]
