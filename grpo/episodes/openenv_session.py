"""One session with an OpenEnv server: a WebSocket on which every message has exactly one answer.

    session = Session("http://localhost:8000", connect_timeout=10)
    outcome = await session.reset({"seed": 3})
    outcome = await session.step({"message": "hello"})
    await session.close()

Answers carry no number: the next one on a socket is that of the last message. So the socket is dropped as soon as an answer
does not arrive, for whatever reason: a time limit, a cancelled task, a lost connection. The server then ends the session. No
step is ever sent twice. Only connecting is repeated, and a reset if its session was not admitted, or ended between episodes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.protocol import State

MOST_BYTES = 100 * 2**20
"""Longest answer: OpenEnv's own limit."""

CLOSE_TIMEOUT_S = 5.0


class SessionLostError(ConnectionError):
    """The session is over, and with it the state of its world."""


class RefusedError(SessionLostError):
    """There is no session yet: the server cannot be reached, or has as many sessions as it allows."""


class EnvironmentFailedError(RuntimeError):
    """The environment raised an exception on the server. The session is still there."""


class InvalidActionError(ValueError):
    """The server did not accept the action, and did nothing. The session is still there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the server answered to a reset or a step."""

    observation: Mapping[str, object]
    reward: float | None
    done: bool


class Session:
    """See the module's docstring. It is used on one event loop. Concurrent calls wait for each other, in their order.

    Args:
        url: of the server, `http` or `https`, without a slash at the end.
        connect_timeout: seconds in which a session must be opened.
    """

    def __init__(self, url: str, *, connect_timeout: float) -> None:
        self.url = url
        self.connect_timeout = connect_timeout
        self._connection: ClientConnection | None = None
        self._lock = asyncio.Lock()

    @property
    def is_lost(self) -> bool:
        """Whether the socket was dropped or never opened."""
        return self._connection is None

    async def reset(self, arguments: Mapping[str, object]) -> Outcome:
        """Begin an episode, in the open session or in a new one. Tries for `connect_timeout` while the server admits none.

        Raises:
            SessionLostError: the server cannot be reached, admits no further session, or the connection was lost.
            EnvironmentFailedError: the environment's reset failed.
        """
        async with self._lock:
            deadline = asyncio.get_running_loop().time() + self.connect_timeout
            pause = 0.1
            while True:
                is_reused = self._connection is not None and self._connection.state is State.OPEN
                try:
                    if not is_reused:
                        await self._connect(deadline)
                    return self._outcome(await self._ask({"type": "reset", "data": dict(arguments)}))
                except RefusedError:
                    if asyncio.get_running_loop().time() + pause > deadline:
                        raise
                except InvalidActionError as error:
                    raise EnvironmentFailedError(f"{self.url}: the environment's reset failed: {error}") from error
                except SessionLostError:
                    if not is_reused:  # otherwise the server ended it between two episodes
                        raise
                    continue
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)

    async def step(self, action: Mapping[str, object]) -> Outcome:
        """Take one step. It is sent once.

        Raises:
            SessionLostError: the session is over: the connection was lost, or an earlier answer did not arrive in time.
            EnvironmentFailedError: the environment failed.
            InvalidActionError: the action does not fit the server's schema.
        """
        async with self._lock:
            if self._connection is None:
                raise SessionLostError(f"{self.url}: the session of this episode is lost: an earlier answer did not arrive")
            return self._outcome(await self._ask({"type": "step", "data": dict(action)}))

    async def admitted(self) -> bool:
        """Open a session, unless the server has as many as it allows; returns whether it is open.

        Raises:
            SessionLostError: the server cannot be reached, or cannot make an environment.
        """
        async with self._lock:
            await self._connect(asyncio.get_running_loop().time() + self.connect_timeout)
            try:
                self._data(await self._ask({"type": "state"}), expected="state")
            except RefusedError:
                return False
            except (EnvironmentFailedError, InvalidActionError):
                pass  # some have no state before the first reset
            return True

    async def close(self) -> None:
        """End the session; returns when the server has ended it, or after `CLOSE_TIMEOUT_S`."""
        connection = self._connection
        self._connection = None
        if connection is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await connection.send(json.dumps({"type": "close"}))
                await connection.wait_closed()
        except (ConnectionClosed, TimeoutError):
            pass
        finally:
            connection.transport.abort()

    def drop(self) -> None:
        """Close the socket at once, without waiting for the server, so that no later answer can be read from it."""
        if self._connection is not None:
            self._connection.transport.abort()
            self._connection = None

    async def _connect(self, deadline: float) -> None:
        address = f"ws{self.url.removeprefix('http')}/ws"
        seconds = max(deadline - asyncio.get_running_loop().time(), 0.1)
        try:
            self._connection = await connect(
                address,
                open_timeout=seconds,
                max_size=MOST_BYTES,
                ping_interval=None,  # a server that computes answers no pings; the caller has a time limit
                proxy=None if is_loopback(self.url) else True,
            )
        except (OSError, EOFError, WebSocketException) as error:
            status = error.response.status_code if isinstance(error, InvalidStatus) else 0
            kind = RefusedError if isinstance(error, OSError | EOFError) or status >= 500 else SessionLostError
            raise kind(f"{self.url}: cannot connect to the OpenEnv server: {_sentence(error)}") from error

    async def _ask(self, message: Mapping[str, object]) -> object:
        """Send a message; returns the answer. Drops the socket unless a JSON document arrives."""
        connection = self._connection
        assert connection is not None
        answered = False
        try:
            try:
                await connection.send(json.dumps(message))
            except ConnectionClosed:
                pass  # the reason of a server that admits no session can still be read
            answer = json.loads(await connection.recv())
            answered = True
            return answer
        except ConnectionClosed as error:
            raise SessionLostError(f"{self.url}: the connection to the OpenEnv server was lost: {_sentence(error)}") from error
        except ValueError as error:
            raise self._lost("the server's answer is no JSON document") from error
        finally:
            if not answered:  # also a cancelled task
                self.drop()

    def _data(self, answer: object, *, expected: str) -> Mapping[str, object]:
        """The content of an answer of this type. Drops the socket unless the session can go on."""
        message = answer if isinstance(answer, dict) else {}
        data = message.get("data")
        if message.get("type") == expected and isinstance(data, dict):
            return data
        if message.get("type") != "error" or not isinstance(data, dict):
            raise self._lost(f"the server's answer is not of OpenEnv's protocol: {str(answer)[:200]}")
        text, code = data.get("message") or "no reason given", data.get("code")
        if code == "VALIDATION_ERROR":
            raise InvalidActionError(_invalid(data))
        if code == "EXECUTION_ERROR":
            raise EnvironmentFailedError(f"{self.url}: the environment failed: {text}")
        self.drop()
        kind = RefusedError if code == "CAPACITY_REACHED" else SessionLostError
        raise kind(f"{self.url}: the OpenEnv server ended the session: {text} ({code})")

    def _outcome(self, answer: object) -> Outcome:
        data = self._data(answer, expected="observation")
        observation, reward, done = data.get("observation"), data.get("reward"), data.get("done", False)
        if not isinstance(observation, dict):
            raise self._lost(f"the observation is not an object: {str(observation)[:200]}")
        if reward is not None and not isinstance(reward, int | float):
            raise self._lost(f"the reward is not a number: {str(reward)[:200]}")
        return Outcome(observation=observation, reward=None if reward is None else float(reward), done=bool(done))

    def _lost(self, reason: str) -> SessionLostError:
        self.drop()
        return SessionLostError(f"{self.url}: {reason}")


def is_loopback(url: str) -> bool:
    """Whether the server runs on this machine, where no proxy leads to."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _sentence(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _invalid(data: Mapping[str, object]) -> str:
    """What is wrong with an action, from the server's list of errors. The model reads it, so it names no server."""
    errors = data.get("errors")
    lines = []
    for error in errors if isinstance(errors, list) else []:
        if isinstance(error, dict):
            place = error.get("loc")
            name = ".".join(str(part) for part in place) if isinstance(place, list) else ""
            lines.append(f"{name}: {error.get('msg')}" if name else str(error.get("msg")))
    return "invalid: " + ("; ".join(lines) or str(data.get("message")))
