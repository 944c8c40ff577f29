"""A real HTTP server with the part of OpenAI's chat endpoint that a judge needs; by default it replies with the question.

    with judge_server() as server:
        server.answer = lambda question: (429, "slow down")
        reward = judge(model="m", base_url=server.url)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = str | tuple[int, str] | dict[str, Any]
"""A reply, or a status with an error message, or the complete body."""


@dataclass
class JudgeServer:
    """The requests that the server got, and how it answers."""

    answer: Callable[[str], Answer] = lambda question: question
    url: str = ""
    questions: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    num_concurrent: int = 0
    max_concurrent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end of the test, so that hanging answers return."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    state: JudgeServer

    def setup(self) -> None:
        super().setup()
        self.state.connections.add(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        state, question = self.state, body["messages"][-1]["content"]
        with state.lock:
            state.questions.append(question)
            state.bodies.append(body)
            state.keys.append(self.headers["authorization"])
            state.num_concurrent += 1
            state.max_concurrent = max(state.max_concurrent, state.num_concurrent)
        try:
            answer = state.answer(question) if self.path == "/v1/chat/completions" else (404, "no such path")
        finally:
            with state.lock:
                state.num_concurrent -= 1
        self.send(answer)

    def send(self, answer: Answer) -> None:
        status, body = 200, answer
        if isinstance(answer, str):
            body = completion(answer)
        elif isinstance(answer, tuple):
            status, body = answer[0], {"error": {"message": answer[1]}}
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client gave up
            pass


def completion(text: str | None, *, finish_reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    state = JudgeServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    server.daemon_threads = False  # closing the server waits for its threads
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield state
    state.released.set()
    server.shutdown()
    thread.join()
    for connection in state.connections:
        try:
            connection.shutdown(2)
        except OSError:  # closed already
            pass
    server.server_close()
