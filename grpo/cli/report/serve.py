"""`rankup report RUN --serve`: the page of a run that goes on, served to this machine only.

    server = make_server([RunFolder(Path("runs/quickstart"))], port=0)
    server.server_address       # ("127.0.0.1", 43121)
    server.serve_forever()

The page asks `/new` now and then for the rows that it does not have, and `/part/RUN/STEP` for the completions of a step when
someone looks at it. Nothing happens between the questions: a run is read only while a page is open, and never locked.

Completions may be private: the server listens on 127.0.0.1, and refuses requests for another host, which a web page elsewhere
could have made a browser send.
"""

from __future__ import annotations

import json
import threading
import webbrowser
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from .completions import step_entry
from .data import PackedRun, compress, describe, open_runs
from .page import render_page
from .runs import RestartedError, RunFolder, columns_of

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
MOST_PARTS = 64  # kept in memory


@dataclass(slots=True)
class LiveRun:
    """A run that is read again whenever a page asks. `generation` counts how often another run has taken its folder."""

    one: PackedRun
    generation: int = 0
    _entries: dict[Path, tuple[tuple[int, int], dict[str, Any] | None]] = field(default_factory=dict)

    @property
    def seen(self) -> str:
        """What a page has seen that was told everything until now."""
        run, steps = self.one.run, sum(entry is not None for _, entry in self._entries.values())
        return f"{self.generation}.{len(run.rows)}.{steps}.{len(run.summary())}"

    def update(self) -> None:
        """Read what is new."""
        run = self.one.run
        try:
            run.read_rows()
        except RestartedError:
            self.one.run = RunFolder(run.folder)
            self._entries.clear()
            self.generation += 1
            self.one.run.read_rows()
        files = self.one.run.completions_files()
        for step, path in files.items():
            self._update_entry(step, path)
        for path in self._entries.keys() - files.values():
            del self._entries[path]

    def _update_entry(self, step: int, path: Path) -> None:
        try:
            status = path.stat()
            identity = (status.st_mtime_ns, status.st_size)
            if self._entries.get(path, (None,))[0] == identity:
                return
            self._entries[path] = (identity, None)  # what is no completions file is looked at again when it has changed
            self._entries[path] = (identity, {"step": step, **step_entry(path)})
        except FileNotFoundError:
            self._entries.pop(path, None)
        except ValueError:
            pass

    def index(self, rows_seen: int = 0) -> dict[str, Any]:
        """The run in the index of the page, with the rows that are not seen yet."""
        steps = [entry for _, entry in self._entries.values() if entry is not None]
        steps.sort(key=lambda entry: entry["step"])
        return describe(self.one, columns_of(self.one.run.rows[rows_seen:]), steps) | {"seen": self.seen}

    def news(self, seen: str) -> dict[str, Any] | None:
        """What a page with this `seen` lacks; None if it must start again."""
        if seen == self.seen:
            return {"seen": seen}
        generation, rows, *_ = seen.split(".")
        if int(generation) != self.generation or not 0 <= int(rows) <= len(self.one.run.rows):
            return None
        return self.index(int(rows))

    def part(self, step: int) -> tuple[Path, int] | None:
        """The completions file of a step and the time of its last change."""
        path = self.one.run.completions_files().get(step)
        try:
            return None if path is None else (path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            return None


class LivePage(ThreadingHTTPServer):
    """Serves the page of some runs."""

    daemon_threads = True

    def __init__(self, runs: Sequence[RunFolder], *, port: int) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.runs = [LiveRun(one) for one in open_runs(runs)]
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[Path, int], bytes] = OrderedDict()

    def page(self) -> bytes:
        """The page with all rows until now; completions are fetched later."""
        with self._lock:
            for run in self.runs:
                run.update()
            index = {"runs": [run.index() for run in self.runs]}
        return render_page(" and ".join(run.one.name for run in self.runs), compress(index), {}, live=True).encode()

    def news(self, seen: Sequence[str]) -> Mapping[str, Any]:
        """What is new since a page has seen this, by run.

        Raises:
            ValueError: that is no `seen` of these runs.
        """
        with self._lock:
            for run in self.runs:
                run.update()
            news = [run.news(of_run) for run, of_run in zip(self.runs, seen, strict=True)]
        return {"restart": True} if None in news else {"runs": news}

    def part(self, run: int, step: int) -> bytes | None:
        """The completions of a step as gzip; None if there are none."""
        with self._lock:
            found = self.runs[run].part(step) if 0 <= run < len(self.runs) else None
            if found is None:
                return None
            if found not in self._parts:
                packed = self.runs[run].one.pack(found[0])
                if packed is None:
                    return None
                self._parts[found] = packed.part
                if len(self._parts) > MOST_PARTS:
                    self._parts.popitem(last=False)
            return self._parts[found]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = cast(LivePage, self.server)
        url = urlsplit(self.path)
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in HOSTS:
            return self._answer(HTTPStatus.FORBIDDEN, b"this server answers to 127.0.0.1 and localhost only", "text/plain")
        try:
            if url.path == "/":
                return self._answer(HTTPStatus.OK, server.page(), "text/html; charset=utf-8")
            if url.path == "/new":
                news = server.news(parse_qs(url.query).get("seen", [""])[0].split(","))
                return self._answer(HTTPStatus.OK, json.dumps(news).encode(), "application/json")
            if url.path.startswith("/part/"):
                run, step = map(int, url.path.removeprefix("/part/").split("/"))
                part = server.part(run, step)
                if part is not None:
                    return self._answer(HTTPStatus.OK, part, "application/octet-stream")
        except ValueError as error:
            return self._answer(HTTPStatus.BAD_REQUEST, str(error).encode(), "text/plain; charset=utf-8")
        self._answer(HTTPStatus.NOT_FOUND, b"no such page", "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the page was closed meanwhile
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def make_server(runs: Sequence[RunFolder], *, port: int) -> LivePage:
    """A server of these runs on 127.0.0.1. `port`: 0 for a free one.

    Raises:
        ValueError: the port is taken, or not allowed.
    """
    try:
        return LivePage(runs, port=port)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {ADDRESS}:{port}: {error}; leave out --port for a free one") from error


def serve(runs: Sequence[RunFolder], *, port: int, is_opened: bool) -> int:
    """Serve the page until Ctrl-C; returns the exit status."""
    with make_server(runs, port=port) as server:
        address = f"http://{ADDRESS}:{server.server_address[1]}/"
        print(f"{address}\nonly this machine can open it; Ctrl-C ends it", flush=True)
        if is_opened:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
