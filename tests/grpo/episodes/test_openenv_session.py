"""Sessions that fail, are late or are not admitted; the server is in another process: tests/support/openenv_server.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest
from openenv_server import Server, openenv_server

from rankup.grpo.episodes.openenv import OpenEnvTextEnvironment, openenv_factory
from rankup.grpo.episodes.openenv_session import EnvironmentFailedError, RefusedError, SessionLostError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with openenv_server() as running:
        yield running


def text_environment(server: Server, world: str = "echo", *, connect_timeout: float = 10.0) -> OpenEnvTextEnvironment:
    environment = openenv_factory(f"{server.url}/{world}", connect_timeout=connect_timeout)()
    assert isinstance(environment, OpenEnvTextEnvironment)
    return environment


async def until_arrived(server: Server, world: str, count: int) -> None:
    """Wait until the server has got this many messages."""
    while len(await asyncio.to_thread(server.log, world)) < count:
        await asyncio.sleep(0.01)


async def cancelled_while_late(server: Server, call: Awaitable[Any]) -> None:
    """Make the call, and cancel it, as a time limit does, when the server holds its answer back."""
    before = len(server.log("echo"))
    task = asyncio.ensure_future(call)
    await until_arrived(server, "echo", before + 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("late", ["reset", "respond"])
def test_check_17_a_late_answer_is_never_taken_for_the_next_one(server: Server, late: str):
    async def play() -> None:
        environment = text_environment(server)
        before = len(server.log("echo"))
        await environment.reset(word="first")
        call = environment.respond("hang") if late == "respond" else environment.reset(order="hang")
        await cancelled_while_late(server, call)
        server.release("echo")

        assert await environment.reset(word="second") == '{"word": "second"}'
        assert await environment.respond("a") == "a 1"
        assert await environment.respond("b") == "b 2"
        assert [message["type"] for message in server.log("echo")[before:]] == [
            "reset",
            "step" if late == "respond" else "reset",  # not repeated
            "reset",
            "step",
            "step",
        ]
        await environment.close()

    asyncio.run(play())


def test_check_17_the_episode_of_a_late_answer_cannot_go_on_and_has_no_reward(server: Server):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        await environment.respond("a")
        await cancelled_while_late(server, environment.respond("hang"))
        before = len(server.log("echo"))
        with pytest.raises(SessionLostError, match=f"{server.url}/echo: .*lost"):
            await environment.respond("b")
        server.release("echo")
        assert len(server.log("echo")) == before  # nothing was sent
        assert environment.get_reward() is None

    asyncio.run(play())


def test_the_server_ends_the_session_of_a_dropped_socket(server: Server):
    """With one session allowed, the next episode needs the place of the dropped one."""

    async def play() -> None:
        environment = text_environment(server, "one")
        await environment.reset()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(environment.respond("hang"), 0.05)
        server.release("one")
        assert await environment.reset(word="next") == '{"word": "next"}'
        await environment.close()
        assert server.active("one") == 0

    asyncio.run(play())


@pytest.mark.parametrize(
    ("message", "kind", "reason"),
    [
        ("crash", EnvironmentFailedError, "the environment failed: the step crashed"),
        ("die", SessionLostError, "the connection to the OpenEnv server was lost"),
        ("garbage", SessionLostError, "the server's answer is no JSON document"),
        ("odd", SessionLostError, "the server's answer is not of OpenEnv's protocol: .*surprise"),
    ],
)
def test_a_failure_of_a_step_names_the_server_and_the_next_episode_is_a_new_one(
    server: Server, message: str, kind: type[Exception], reason: str
):
    async def play() -> None:
        environment = text_environment(server)
        await environment.reset()
        before = len(server.log("echo"))
        with pytest.raises(kind, match=f"{server.url}/echo: {reason}"):
            await environment.respond(message)
        assert len(server.log("echo")) == before + 1  # sent once
        with pytest.raises(SessionLostError):
            await environment.respond("a")
        await environment.reset()
        assert await environment.respond("a") == "a 1"
        await environment.close()

    asyncio.run(play())


def test_a_failed_tool_leaves_the_session_open(server: Server):
    """The episode goes on: only `respond` and `reset` make it void."""

    async def play() -> None:
        environment = openenv_factory(f"{server.url}/mcp")()
        await environment.reset()
        with pytest.raises(EnvironmentFailedError, match="unsupported operand"):
            await environment.tools[0][3](a="x")
        assert await environment.tools[0][3](a=1) == "1"
        await environment.close()

    asyncio.run(play())


def test_a_reset_that_fails_leaves_no_session(server: Server):
    async def play() -> None:
        environment = text_environment(server, "one")
        with pytest.raises(EnvironmentFailedError, match=f"{server.url}/one: .*the reset crashed"):
            await environment.reset(order="crash")
        other = text_environment(server, "one")
        await other.reset()
        await other.close()

    asyncio.run(play())


def test_a_server_that_cannot_make_an_environment_is_an_error_of_the_reset(server: Server):
    async def play() -> None:
        with pytest.raises(SessionLostError, match=f"{server.url}/factory: .*no such game.*FACTORY_ERROR"):
            await text_environment(server, "factory").reset()

    asyncio.run(play())
    with pytest.raises(SessionLostError, match="FACTORY_ERROR"):
        openenv_factory(f"{server.url}/factory").capacity(2)


def test_a_server_that_dies_is_an_error_of_the_step_and_of_the_next_reset():
    async def play(server: Server) -> None:
        environment = text_environment(server, connect_timeout=0.3)
        await environment.reset()
        server.process.kill()
        server.process.wait()
        with pytest.raises(SessionLostError, match=f"{server.url}/echo: the connection .* was lost"):
            await environment.respond("a")
        with pytest.raises(RefusedError, match=f"{server.url}/echo: cannot connect"):
            await environment.reset()
        await environment.close()

    with openenv_server() as server:
        asyncio.run(play(server))


def test_capacity_is_the_number_of_sessions_that_are_admitted(server: Server):
    async def in_a_running_loop() -> int | None:
        return one.capacity(3)

    one, many = openenv_factory(f"{server.url}/one"), openenv_factory(f"{server.url}/echo")
    assert one.capacity(3) == 1
    assert one.capacity(1) is None  # the sessions of the last call are closed
    assert many.capacity(50) is None
    assert many.capacity(150) == 100
    assert asyncio.run(in_a_running_loop()) == 1
    assert server.active("one") == server.active("echo") == 0


def test_an_episode_beyond_the_capacity_waits_for_a_session_and_then_fails(server: Server):
    async def play() -> None:
        first, second = text_environment(server, "one"), text_environment(server, "one")
        impatient = text_environment(server, "one", connect_timeout=0.3)
        await first.reset()
        with pytest.raises(RefusedError, match=f"{server.url}/one: .*1/1 sessions active.*CAPACITY_REACHED"):
            await impatient.reset()
        before = len(server.log("one"))
        waiting = asyncio.create_task(second.reset(word="b"))
        await asyncio.sleep(0)
        await first.close()
        assert await waiting == '{"word": "b"}'
        assert [message["type"] for message in server.log("one")[before:]] == ["close", "reset"]
        await second.close()

    asyncio.run(play())
