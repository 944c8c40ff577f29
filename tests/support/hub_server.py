"""A small model hub over HTTP, for uploads: repositories in memory, every file in the commit itself.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token="any").upload_folder(repo_id="me/mine", folder_path=folder)
        hub.repositories["me/mine"]["README.md"]
"""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "hf_of_a_test"


class HubServer:
    """See the module's docstring.

    Attributes:
        repositories: files by repository and path.
        private: by repository, what the request asked for.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid username or password."})
                return self.answer(200, hub.post(self.path, body))

            def answer(self, status: int, value: Any) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.private[name] = asked.get("visibility") == "private" or asked.get("private")
            return {"url": f"{self.url}/{name}"}
        owner, name, action = path.removeprefix("/api/models/").split("/")[:3]
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        assert action == "commit", path
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.repositories[f"{owner}/{name}"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.url}/{owner}/{name}/commit/1", "commitOid": "1"}

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
