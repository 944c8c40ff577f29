"""The client against a server of OpenEnv's protocol in another process; see tests/support/openenv_server.py."""

from __future__ import annotations

import asyncio
import datetime
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openenv_server import Server, openenv_server

from rankup.grpo.episodes.openenv import OpenEnvEnvironment, OpenEnvTextEnvironment, observation_text, openenv_factory
from rankup.grpo.episodes.openenv_session import EnvironmentFailedError, InvalidActionError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with openenv_server() as running:
        yield running


def text_environment(server: Server, world: str = "echo", *, connect_timeout: float = 10.0) -> OpenEnvTextEnvironment:
    environment = openenv_factory(f"{server.url}/{world}", connect_timeout=connect_timeout)()
    assert isinstance(environment, OpenEnvTextEnvironment)
    return environment


def test_seed_and_columns_of_the_row_reach_the_reset_except_what_json_cannot_hold(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        text = await environment.reset(
            seed=2**63, prompt=[{"role": "user", "content": "é"}], day=datetime.date(2026, 1, 1), none=None
        )
        assert text == '{"none": null, "prompt": [{"content": "\\u00e9", "role": "user"}], "seed": 9223372036854775808}'
        assert await environment.reset() == "{}"
        await environment.close()

    asyncio.run(play())


def test_rewards_of_steps_are_summed_and_an_episode_without_any_has_none(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        assert environment.get_reward() is None
        await environment.respond("null")
        assert environment.get_reward() is None
        await environment.respond("a")
        await environment.respond("null")
        await environment.respond("b")
        assert environment.get_reward() == 1.0
        await environment.close()

    asyncio.run(play())


def test_check_20_nothing_of_an_episode_is_left_after_the_next_reset(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        await environment.respond("done")
        assert environment.done
        with pytest.raises(RuntimeError, match="over"):
            await environment.respond("after the end")
        assert environment.get_reward() == 0.5
        await environment.reset()
        assert not environment.done
        assert environment.get_reward() is None
        assert await environment.respond("a") == "a 1"
        await environment.reset(order="done")
        assert environment.done
        await environment.close()

    asyncio.run(play())


def test_a_session_is_opened_by_the_first_reset_and_reused_until_it_is_closed(server: Server):
    async def play() -> None:
        factory = openenv_factory(f"{server.url}/nested/path/")
        environment = factory()
        assert server.active("nested/path") == 0
        for _ in range(3):
            await environment.reset()
            assert server.active("nested/path") == 1
        await environment.close()
        assert server.active("nested/path") == 0
        await environment.close()
        assert [message["type"] for message in server.log("nested/path")] == ["reset", "reset", "reset", "close"]
        await environment.reset()
        assert server.active("nested/path") == 1
        await environment.close()

    asyncio.run(play())


def test_a_session_that_the_server_ended_between_episodes_is_opened_again(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        assert await environment.respond("bye") == "bye 1"
        assert await environment.reset(word="new") == '{"word": "new"}'
        assert await environment.respond("a") == "a 1"
        await environment.close()

    asyncio.run(play())


def test_check_14_one_seed_gives_one_world(server: Server):
    async def play() -> list[str]:
        answers = []
        for seed in (3, 3, 5):
            environment = text_environment(server, "guess")
            assert await environment.reset(seed=seed) == "Guess a number from 1 to 16."
            low, high, turns = 1, 16, []
            while not environment.done:
                turns.append(await environment.respond(str((low + high) // 2)))
                low, high = ((low + high) // 2 + 1, high) if turns[-1] == "higher" else (low, (low + high) // 2 - 1)
            assert environment.get_reward() == 1.0
            answers.append(" ".join(turns))
            await environment.close()
        return answers

    first, second, other = asyncio.run(play())
    assert first == second != other


def test_an_action_of_typed_fields_is_one_tool(server: Server):
    async def play() -> None:
        environment = openenv_factory(f"{server.url}/typed")()
        assert not hasattr(environment, "respond")
        [(name, description, schema, step)] = environment.tools
        assert (name, description) == ("place_stone", "Place a stone.")
        assert schema["required"] == ["row", "colour"]
        assert schema["properties"] == {
            "row": {"description": "from the top", "minimum": 0, "title": "Row", "type": "integer"},
            "colour": {"enum": ["black", "white"], "title": "Colour", "type": "string"},
        }
        await environment.reset()
        assert await step(row=1, colour="white") == '{"board": ["é", "white"], "row": 1}'
        with pytest.raises(InvalidActionError, match=r"row: .*greater than or equal to 0; colour: .*'black' or 'white'"):
            await step(row=-1, colour="red")
        with pytest.raises(InvalidActionError, match="size: Extra inputs"):
            await step(row=1, colour="white", size=3)
        await step(row=3, colour="black")  # the session is still there
        assert environment.done
        assert environment.get_reward() == 2.0
        await environment.close()

    asyncio.run(play())


def test_mcp_tools_of_a_server_are_the_tools(server: Server):
    async def play() -> None:
        environment = openenv_factory(f"{server.url}/mcp")()
        assert not hasattr(environment, "respond")
        (add, text, schema, call), (fail, _, _, call_fail) = environment.tools
        assert (add, text, fail) == ("add", "Add.", "fail")
        assert schema == {"type": "object", "properties": {"a": {"type": "integer"}}}
        assert await environment.reset() == ""
        assert await call(a=2, b=3) == "5"
        with pytest.raises(EnvironmentFailedError, match="it failed"):
            await call_fail()
        assert environment.get_reward() == 2.0
        await environment.close()

    asyncio.run(play())


def test_check_4_concurrent_calls_get_their_own_answers_in_order(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        answers = await asyncio.gather(*(environment.respond(word) for word in "abc"))
        assert answers == ["a 1", "b 2", "c 3"]
        await environment.close()

    asyncio.run(play())


def test_many_episodes_at_once_do_not_mix(server: Server):
    async def episode(number: int) -> list[str]:
        environment = factory()
        assert isinstance(environment, OpenEnvTextEnvironment)
        try:
            first = await environment.reset(number=number)
            return [first, *[await environment.respond(f"{number}") for _ in range(3)]]
        finally:
            await environment.close()

    async def play() -> list[list[str]]:
        return await asyncio.gather(*(episode(number) for number in range(64)))

    factory = openenv_factory(f"{server.url}/echo")
    assert asyncio.run(play()) == [[f'{{"number": {n}}}', f"{n} 1", f"{n} 2", f"{n} 3"] for n in range(64)]


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(min_size=1).map(lambda text: f"_{text}"), min_size=1, max_size=20))
def test_any_text_arrives_as_it_is(server: Server, texts: list[str]):
    async def play() -> list[str]:
        environment = text_environment(server)
        await environment.reset()
        try:
            return [await environment.respond(text) for text in texts]
        finally:
            await environment.close()

    assert asyncio.run(play()) == [f"{text} {number}" for number, text in enumerate(texts, start=1)]


def test_a_text_that_the_server_does_not_accept_is_answered_with_the_reason(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        assert await environment.respond("") == "invalid: message: String should have at least 1 character"
        assert await environment.respond("a") == "a 1"
        await environment.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ws://localhost:8000",
        "http://",
        "http:///path",
        "http://host:port",
        "http://h:99999",
        "http://h/?a=1",
    ],
)
def test_an_address_of_another_form_is_refused(url: str):
    with pytest.raises(ValueError, match="is not the address of an OpenEnv server: write http://host:port"):
        openenv_factory(url)


def test_an_address_without_an_openenv_server_is_refused(server: Server):
    with pytest.raises(ValueError, match=f"{server.url}/nothing/schema answers with status 404"):
        openenv_factory(f"{server.url}/nothing")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot reach the OpenEnv server at http://127.0.0.1:{port}/schema.*Is it running"):
        openenv_factory(f"http://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ValueError, match=r"cannot reach the OpenEnv server.*timed out"):
            openenv_factory(f"http://127.0.0.1:{port}", connect_timeout=0.2)


def test_no_proxy_leads_to_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def play() -> None:
        environment = text_environment(server)
        assert await environment.reset() == "{}"
        await environment.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({"text": "a\n<b>"}, "a\n<b>"),
        ({"any_name": "a", "done": True, "reward": 1, "metadata": {"x": 1}, "error": None}, "a"),
        ({"text": "a", "score": 3}, '{"text": "a", "score": 3}'),
        ({"number": 3}, '{"number": 3}'),
        ({"stdout": "é", "stderr": ""}, '{"stdout": "é", "stderr": ""}'),
        ({"text": ""}, ""),
        ({}, ""),
        ({"done": False}, ""),
        ({"tool_name": "t", "result": "plain"}, "plain"),
        ({"tool_name": "t", "result": [1, "é"]}, '[1, "é"]'),
        ({"tool_name": "t", "result": None, "error": None}, ""),
        ({"tool_name": "t", "result": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}, "a\nb"),
        ({"tool_name": "t", "result": {"content": [{"type": "image"}]}}, '[{"type": "image"}]'),
        ({"tool_name": "t", "result": {"sum": 5}}, '{"sum": 5}'),
        ({"tool_name": "t", "turn": 5}, '{"tool_name": "t", "turn": 5}'),
    ],
)
def test_an_observation_as_text(observation: dict[str, Any], text: str):
    assert observation_text(observation) == text


def test_the_result_of_an_mcp_tool_that_is_an_error_is_raised():
    with pytest.raises(EnvironmentFailedError, match="bad"):
        observation_text({"tool_name": "t", "result": {"content": [{"type": "text", "text": "bad"}], "is_error": True}})


def test_the_only_public_methods_are_those_of_the_interface(server: Server):
    """Every other one would be taken for a tool."""

    def methods(kind: type[OpenEnvEnvironment]) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert methods(OpenEnvEnvironment) == {"reset", "get_reward", "close"}
    assert methods(OpenEnvTextEnvironment) == {"reset", "get_reward", "close", "respond"}
