"""A hub over HTTP with one data set, for downloads: its files, and the types that the Hub's viewer has guessed.

    with HubData({"train.jsonl": b"..."}) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)        # load_dataset("me/sums")
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


class HubData:
    """See the module's docstring. The data set is `me/sums`, at any revision."""

    def __init__(self, files: dict[str, bytes]) -> None:
        listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": _hash(files[name])} for name in files]

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                path = unquote(urlparse(self.path).path)
                asked = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
                name = path.partition("/resolve/")[2].partition("/")[2]
                if name in files:
                    return self.send(files[name], ETag=f'"{_hash(files[name])}"')
                if path.endswith(f"/tree/{COMMIT}"):
                    return self.send(listed)
                if "/paths-info/" in path:
                    return self.send([file for file in listed if file["path"] in asked])
                if path.startswith("/api/datasets/me/sums") and "/tree/" not in path:
                    return self.send({"id": "me/sums", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
                return self.send({}, status=404, **{"X-Error-Code": "EntryNotFound"})

            do_GET = do_HEAD = do_POST = answer

            def send(self, content: Any, *, status: int = 200, **headers: str) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for header, value in {"X-Repo-Commit": COMMIT, **headers, "Content-Length": str(len(data))}.items():
                    self.send_header(header, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
