"""A server of OpenEnv's protocol in another process: `/ws`, `/schema`, `/mcp`. Several small worlds, each under its own path.

    with openenv_server() as server:
        environment = openenv_factory(f"{server.url}/echo")()
        server.log("echo")                # the messages that arrived
        server.release("echo")            # answers that are late arrive now

Worlds: `echo` (one text; the text says what happens), `guess` (a number from 1 to 16), `typed` (two typed fields), `mcp` (two
tools), `one` (`echo` for one session at a time), `factory` (cannot be made), `nested/path` (`echo`).
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Action(BaseModel):
    """As OpenEnv's base class."""

    model_config = ConfigDict(extra="forbid")
    metadata: dict[str, Any] = Field(default_factory=dict)


class EchoAction(Action):
    """A message to repeat."""

    kind: Literal["text"] = "text"
    message: str = Field(min_length=1)
    loud: bool = False


class GuessAction(Action):
    number: str


class PlaceStoneAction(Action):
    """Place a stone."""

    row: int = Field(ge=0, description="from the top")
    colour: Literal["black", "white"]


class CallToolAction(Action):
    type: Literal["call_tool"] = "call_tool"
    tool_name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


Outcome = tuple[dict[str, Any], float | None, bool]


class EchoWorld:
    """Says what it is told to. `crash`, `hang`, `die`, `garbage`, `odd`, `done`, `null`, and `bye`: answer and close."""

    action: type[Action] = EchoAction

    def __init__(self, site: Site) -> None:
        self.site = site
        self.steps = 0

    async def reset(self, **arguments: Any) -> Outcome:
        self.steps = 0
        if arguments.get("order") == "crash":
            raise RuntimeError("the reset crashed")
        if arguments.get("order") == "hang":
            await self.site.released.wait()
        return {"text": json.dumps(arguments, sort_keys=True), "nothing": None}, None, arguments.get("order") == "done"

    async def step(self, action: Any) -> Outcome:
        self.steps += 1
        if action.message == "crash":
            raise RuntimeError("the step crashed")
        if action.message == "hang":
            await self.site.released.wait()
        return {"echo": f"{action.message} {self.steps}"}, None if action.message == "null" else 0.5, action.message == "done"


class GuessWorld(EchoWorld):
    action = GuessAction

    async def reset(self, *, seed: int | None = None, **_: Any) -> Outcome:
        self.secret = random.Random(seed).randint(1, 16)
        return {"content": "Guess a number from 1 to 16."}, None, False

    async def step(self, action: Any) -> Outcome:
        guess = int(action.number)
        word = "right" if guess == self.secret else "higher" if guess < self.secret else "lower"
        return {"content": word}, float(guess == self.secret), guess == self.secret


class TypedWorld(EchoWorld):
    action = PlaceStoneAction

    async def step(self, action: Any) -> Outcome:
        return {"board": ["é", action.colour], "row": action.row, "note": None, "metadata": {"a": 1}}, 1, action.row == 3


class McpWorld(EchoWorld):
    action = CallToolAction
    tools = (
        {"name": "add", "description": "Add.", "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"name": "fail", "description": "Fail.", "inputSchema": {"type": "object", "properties": {}}},
    )

    async def reset(self, **_: Any) -> Outcome:
        return {"metadata": {"status": "ready"}}, 0.0, False

    async def step(self, action: Any) -> Outcome:
        if action.tool_name == "fail":
            return {"tool_name": "fail", "result": None, "error": {"error_type": "x", "message": "it failed"}}, None, False
        content = [{"type": "text", "text": str(sum(action.arguments.values()))}]
        return {"tool_name": "add", "result": {"content": content, "is_error": False}, "error": None}, 2.0, False


class BrokenWorld(EchoWorld):
    def __init__(self, site: Site) -> None:
        raise RuntimeError("no such game")


class Site:
    """A world, and the sessions on it."""

    def __init__(self, world: type[EchoWorld], capacity: int) -> None:
        self.world, self.capacity = world, capacity
        self.active = 0
        self.log: list[Any] = []
        self.released = asyncio.Event()

    async def serve(self, socket: WebSocket) -> None:
        await socket.accept()
        if self.active >= self.capacity:
            limits = {"active_sessions": self.active, "max_sessions": self.capacity}
            text = f"Server at capacity: {self.active}/{self.capacity} sessions active."
            await self.fail(socket, text, "CAPACITY_REACHED", **limits)
            return await socket.close()
        self.active += 1
        try:
            await self.converse(socket)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client has gone
        finally:
            self.active -= 1
        try:
            await socket.close()
        except RuntimeError:
            pass

    async def converse(self, socket: WebSocket) -> None:
        try:
            world = self.world(self)
        except RuntimeError as error:
            return await self.fail(socket, f"Environment factory failed: {error}", "FACTORY_ERROR")
        while await self.answer(socket, world):
            pass

    async def answer(self, socket: WebSocket, world: EchoWorld) -> bool:
        """Answer one message; whether the session goes on."""
        message = json.loads(await socket.receive_text())
        self.log.append(message)
        data = message.get("data", {})
        if message["type"] == "close" or data.get("message") == "die":
            return False
        if data.get("message") in ("garbage", "odd"):
            await socket.send_text("{" if data["message"] == "garbage" else '{"type": "surprise"}')
            return True
        if message["type"] == "state":
            await socket.send_text(json.dumps({"type": "state", "data": {"step_count": world.steps}}))
            return True
        try:
            is_reset = message["type"] == "reset"
            outcome = await (world.reset(**data) if is_reset else world.step(world.action.model_validate(data)))
        except ValidationError as error:
            errors = error.errors(include_context=False)
            await self.fail(socket, "Invalid message", "VALIDATION_ERROR", errors=errors)
            return True
        except Exception as error:  # as OpenEnv's server
            await self.fail(socket, str(error), "EXECUTION_ERROR")
            return True
        content = dict(zip(("observation", "reward", "done"), outcome, strict=True))
        await socket.send_text(json.dumps({"type": "observation", "data": content}))
        return data.get("message") != "bye"

    async def fail(self, socket: WebSocket, text: str, code: str, **more: Any) -> None:
        await socket.send_text(json.dumps({"type": "error", "data": {"message": text, "code": code, **more}}))

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_websocket_route("/ws", self.serve)

        @app.get("/schema")
        def schema() -> Any:
            return {"action": self.world.action.model_json_schema(), "observation": {}, "state": {}}

        @app.post("/mcp")
        def mcp(request: dict[str, Any]) -> Any:
            tools = getattr(self.world, "tools", None)
            outcome = {"error": {"code": -32603}} if tools is None else {"result": {"tools": tools}}
            return {"jsonrpc": "2.0", "id": request["id"], **outcome}

        @app.get("/log")
        async def log() -> Any:
            return {"active": self.active, "log": self.log}

        @app.post("/release")
        async def release() -> None:
            self.released.set()
            self.released = asyncio.Event()

        return app


WORLDS: Mapping[str, tuple[type[EchoWorld], int]] = {
    "echo": (EchoWorld, 100),
    "guess": (GuessWorld, 100),
    "typed": (TypedWorld, 100),
    "mcp": (McpWorld, 100),
    "one": (EchoWorld, 1),
    "factory": (BrokenWorld, 100),
    "nested/path": (EchoWorld, 100),
}


@dataclass(frozen=True)
class Server:
    """The server's process, as the test sees it."""

    url: str
    process: subprocess.Popen[str]

    def log(self, world: str) -> list[Any]:
        """The messages that arrived, oldest first."""
        return self._get(world)["log"]

    def active(self, world: str) -> int:
        """Sessions that are open."""
        return self._get(world)["active"]

    def release(self, world: str) -> None:
        """Let the answers go that are held back."""
        request = urllib.request.Request(f"{self.url}/{world}/release", method="POST")
        self._opener().open(request, timeout=10).close()

    def _get(self, world: str) -> Any:
        with self._opener().open(f"{self.url}/{world}/log", timeout=10) as response:
            return json.load(response)

    def _opener(self) -> urllib.request.OpenerDirector:
        return urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def openenv_server() -> Iterator[Server]:
    """See the module's docstring."""
    process = subprocess.Popen([sys.executable, Path(__file__)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        yield Server(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until killed. The first line of the output is the port."""
    app = FastAPI()
    for name, (world, capacity) in WORLDS.items():
        app.mount(f"/{name}", Site(world, capacity).app())
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait here until the server runs
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
