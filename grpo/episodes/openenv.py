"""Environments of an OpenEnv server, for `rollout.environment: openenv:http://host:port`.

    factory = openenv_factory("http://localhost:8000")
    environment = factory()
    text = await environment.reset(seed=3, word="apple")
    text = await environment.respond("a guess")          # an action that is one text
    name, description, schema, step = environment.tools[0]    # otherwise: tools
    text = await step(row=1, column=2)

Each environment is one session on the server, which is opened by the first reset and then reused. Rewards of steps are summed.
OpenEnv itself need not be installed.

An observation becomes text by one rule: without `done`, `reward`, `metadata` and nulls, a single field that is a string is the
text; anything else is written as JSON.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from .openenv_session import EnvironmentFailedError, InvalidActionError, Session, is_loopback

RuntimeTool = tuple[str, str, Mapping[str, object], Callable[..., Awaitable[str]]]
"""Name, description, JSON schema of the arguments, and the function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that acts in the environment.

    Attributes:
        parameters: JSON schema of the arguments.
        constants: fields of the action that have one value only.
        mcp_name: its name on the server, if it is an MCP tool; None: the arguments are the action's fields.
    """

    name: str
    description: str
    parameters: Mapping[str, object]
    constants: Mapping[str, object]
    mcp_name: str | None = None

    def action(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """The action of a call."""
        if self.mcp_name is not None:
            return {"type": "call_tool", "tool_name": self.mcp_name, "arguments": dict(arguments)}
        return {**arguments, **self.constants}


class OpenEnvEnvironment:
    """One session. `done` tells whether the environment has ended the episode; `tools` are the actions with typed fields."""

    def __init__(self, session: Session, tools: tuple[Tool, ...] = ()) -> None:
        self.done = False
        self.tools: list[RuntimeTool] = [self._runtime_tool(tool) for tool in tools]
        self._session = session
        self._rewards: list[float] = []

    async def reset(self, *, seed: int | None = None, **row: object) -> str:
        """Begin an episode; returns the first observation. The server gets the columns of the row that JSON can hold.

        Raises:
            SessionLostError: the server cannot be reached, admits no further session, or the connection was lost.
            EnvironmentFailedError: the environment's reset failed.
        """
        self.done = False
        self._rewards = []
        columns = {name: value for name, value in row.items() if _is_json(value)}
        try:
            outcome = await self._session.reset(columns if seed is None else {**columns, "seed": seed})
        except EnvironmentFailedError:
            self._session.drop()  # nobody uses it any more
            raise
        self.done = outcome.done
        return observation_text(outcome.observation)

    def get_reward(self) -> float | None:
        """The sum of the rewards of the steps. None: no step gave one, or the session was lost before the end."""
        if not self._rewards or (self._session.is_lost and not self.done):
            return None
        return sum(self._rewards)

    async def close(self) -> None:
        """End the session."""
        await self._session.close()

    async def _step(self, action: Mapping[str, object]) -> str:
        if self.done:
            raise RuntimeError("the episode is over: the environment accepts no further action")
        outcome = await self._session.step(action)
        self.done = outcome.done
        if outcome.reward is not None:
            self._rewards.append(outcome.reward)
        return observation_text(outcome.observation)

    def _runtime_tool(self, tool: Tool) -> RuntimeTool:
        async def step(**arguments: object) -> str:
            return await self._step(tool.action(arguments))

        return tool.name, tool.description, tool.parameters, step


class OpenEnvTextEnvironment(OpenEnvEnvironment):
    """One session with an environment whose action is one text: it answers to turns."""

    def __init__(self, session: Session, field: str, constants: Mapping[str, object]) -> None:
        super().__init__(session)
        self._field = field
        self._constants = constants

    async def respond(self, text: str) -> str:
        """Take a step with this text; returns the observation, or why the server does not accept the text.

        Raises:
            SessionLostError: the connection was lost.
            EnvironmentFailedError: the environment failed.
        """
        try:
            return await self._step({**self._constants, self._field: text})
        except InvalidActionError as error:
            return str(error)
        except EnvironmentFailedError:
            self._session.drop()
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEnvFactory:
    """Makes environments of one server.

    Attributes:
        url: of the server, without a slash at the end.
        connect_timeout: seconds in which a session must be opened.
        text_field: the action's field for a turn's text; None: the actions are `tools`.
        constants: with `text_field`, fields of the action that have one value only.
        tools: what the model may call.
    """

    url: str
    connect_timeout: float
    text_field: str | None = None
    constants: Mapping[str, object]
    tools: tuple[Tool, ...] = ()

    def __call__(self) -> OpenEnvEnvironment:
        """An environment. Its session is opened by its first reset."""
        session = Session(self.url, connect_timeout=self.connect_timeout)
        if self.text_field is not None:
            return OpenEnvTextEnvironment(session, self.text_field, self.constants)
        return OpenEnvEnvironment(session, self.tools)

    def capacity(self, needed: int) -> int | None:
        """How many of `needed` sessions the server admits at the same time; None: all of them.

        The protocol tells its limit to those only that it turns away, so this opens the sessions, and closes them again.

        Raises:
            SessionLostError: the server cannot be reached, or cannot make an environment.
        """
        with ThreadPoolExecutor(1) as executor:  # a notebook's thread already runs an event loop
            admitted = executor.submit(asyncio.run, self._admitted(needed)).result()
        return None if admitted == needed else admitted

    async def _admitted(self, needed: int) -> int:
        sessions = [Session(self.url, connect_timeout=self.connect_timeout) for _ in range(needed)]
        try:
            return sum(await asyncio.gather(*(session.admitted() for session in sessions)))
        finally:
            await asyncio.gather(*(session.close() for session in sessions))


def openenv_factory(url: str, *, connect_timeout: float = 10.0) -> OpenEnvFactory:
    """Ask the server what an action is; returns what makes environments of it.

    If the action's only required field is a string, the environment has `respond`. If the server lists MCP tools, these are its
    tools. Otherwise the action is one tool.

    Args:
        url: `http://host:port` or `https://host`, with a path if the server has one.
        connect_timeout: seconds for this, and for opening a session later.

    Raises:
        ValueError: no valid address, or no OpenEnv server answers there.
    """
    base = _base(url)
    document = _http(f"{base}/schema", connect_timeout)
    schema = document.get("action") if isinstance(document, dict) else None
    if not isinstance(schema, dict):
        raise ValueError(f"{base}/schema has no schema of actions: is this the address of an OpenEnv server?")
    properties = schema.get("properties")
    fields = {name: field for name, field in (properties or {}).items() if name != "metadata"}
    constants = {name: field["const"] for name, field in fields.items() if "const" in field}
    fields = {name: field for name, field in fields.items() if name not in constants}
    required = [name for name in schema.get("required", ()) if name in fields]
    if constants.get("type") == "call_tool" or (properties is not None and not fields):
        tools = _mcp_tools(base, connect_timeout)
        if tools:
            return OpenEnvFactory(url=base, connect_timeout=connect_timeout, tools=tools, constants={})
    if len(required) == 1 and fields[required[0]].get("type") == "string" and "enum" not in fields[required[0]]:
        return OpenEnvFactory(url=base, connect_timeout=connect_timeout, text_field=required[0], constants=constants)
    parameters = {name: value for name, value in schema.items() if name not in ("title", "description")}
    if properties is not None:
        parameters |= {"type": "object", "properties": fields, "required": required}
    tool = Tool(
        name=_tool_name(str(schema.get("title", ""))),
        description=str(schema.get("description") or "Act in the environment."),
        parameters=parameters,
        constants=constants,
    )
    return OpenEnvFactory(url=base, connect_timeout=connect_timeout, tools=(tool,), constants={})


def observation_text(observation: Mapping[str, object]) -> str:
    """An observation as text; the rule is in the module's docstring.

    The result of an MCP tool is its content. Raises EnvironmentFailedError if the tool failed.
    """
    left_out = ("done", "reward", "metadata")
    fields = {name: value for name, value in observation.items() if name not in left_out and value is not None}
    if "tool_name" in fields and ("error" in fields or fields.keys() <= {"tool_name", "result"}):
        return _mcp_text(fields)
    if len(fields) == 1:
        only = next(iter(fields.values()))
        if isinstance(only, str):
            return only
    return json.dumps(fields, ensure_ascii=False) if fields else ""


def _mcp_text(fields: Mapping[str, object]) -> str:
    error, result = fields.get("error"), fields.get("result", "")
    if error is not None:
        raise EnvironmentFailedError(str(error.get("message")) if isinstance(error, dict) else str(error))
    content = result.get("content") if isinstance(result, dict) else None
    if isinstance(result, dict) and isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        text = "\n".join(texts) if len(texts) == len(parts) else json.dumps(content, ensure_ascii=False)
        if result.get("is_error") or result.get("isError"):
            raise EnvironmentFailedError(text)
        return text
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _mcp_tools(base: str, timeout: float) -> tuple[Tool, ...]:
    """The tools that the server lists; none if it has no MCP tools."""
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    document = _http(f"{base}/mcp", timeout, body=request)
    result = document.get("result") if isinstance(document, dict) else None
    listed = result.get("tools") if isinstance(result, dict) else None
    return tuple(
        Tool(
            name=tool["name"],
            description=tool.get("description") or "",
            parameters=tool.get("input_schema") or tool.get("inputSchema") or {"type": "object", "properties": {}},
            constants={},
            mcp_name=tool["name"],
        )
        for tool in listed or ()
    )


def _http(url: str, timeout: float, *, body: Mapping[str, object] | None = None) -> object:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=content, headers={"Content-Type": "application/json"})
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answers with status {error.code}: is this the address of an OpenEnv server?") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot reach the OpenEnv server at {url}: {error}. Is it running?") from error
    except ValueError as error:
        raise ValueError(f"{url} does not answer with JSON: is this the address of an OpenEnv server?") from error


def _base(url: str) -> str:
    """The address without a slash at the end."""
    try:
        parts = urlsplit(url.strip())
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        is_valid = is_valid and parts.port != 0  # a port that is no number raises ValueError
    except ValueError:
        is_valid = False
        parts = urlsplit("")
    if not is_valid:
        raise ValueError(f"{url!r} is not the address of an OpenEnv server: write http://host:port, or https://host/path")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _tool_name(title: str) -> str:
    """`ConnectFourAction` -> `connect_four`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", title).strip("_").lower()
    return words.removesuffix("_action") or "step"


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
