"""What an editor shows of a user's script, asked as editors ask: over pyright's language server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """\
from rankup import GRPOConfig, GRPOTrainer

config = GRPOConfig(learn)
trainer = GRPOTrainer("model", args=config, peft)
trainer.gen
trainer.state.glob
trainer.train().met
"""


class LanguageServer:
    """pyright's, over its standard input and output (LSP 3.17)."""

    def __init__(self, folder: Path) -> None:
        command = [Path(sys.executable).with_name("pyright-langserver"), "--stdio"]
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.requests = 0

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        self.requests += 1
        self.write({"method": method, "params": params, "id": self.requests})
        while True:
            message = self.read()
            if "method" in message and "id" in message:  # the server asks for settings: there are none
                count = len(message.get("params", {}).get("items", []))
                self.write({"id": message["id"], "result": [None] * count})
            elif message.get("id") == self.requests:
                return message["result"]

    def write(self, message: dict[str, Any]) -> None:
        text = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(text), text))
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        length = 0
        for line in iter(self.process.stdout.readline, b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        assert length, "the language server has ended"
        return json.loads(self.process.stdout.read(length))


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function from a line of `SCRIPT`, counted from 1, to what an editor offers before its last closing parenthesis."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "rankup").symlink_to(ROOT)
    (folder / "script.py").write_text(SCRIPT)
    environment = Path(sys.prefix)
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"venvPath": str(environment.parent), "venv": environment.name, "include": ["script.py"]})
    )
    server, uri = LanguageServer(folder), (folder / "script.py").as_uri()
    folders = [{"uri": folder.as_uri(), "name": "script"}]
    server.ask("initialize", {"processId": None, "rootUri": folder.as_uri(), "workspaceFolders": folders, "capabilities": {}})
    server.write({"method": "initialized", "params": {}})
    document = {"uri": uri, "languageId": "python", "version": 1, "text": SCRIPT}
    server.write({"method": "textDocument/didOpen", "params": {"textDocument": document}})

    def offered(line: int) -> set[str]:
        column = len(SCRIPT.splitlines()[line - 1].rstrip(")"))
        position = {"line": line - 1, "character": column}
        found = server.ask("textDocument/completion", {"textDocument": {"uri": uri}, "position": position})
        items = found["items"] if isinstance(found, dict) else found or []
        return {item["label"] for item in items}

    yield offered
    server.process.kill()
    server.process.wait()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (3, {"learning_rate="}),
        (4, {"peft_config="}),
        (5, {"generate"}),
        (6, {"global_step"}),
        (7, {"metrics"}),
    ],
)
def test_an_editor_completes_options_arguments_and_attributes(completions: Any, line: int, expected: set[str]):
    assert expected <= completions(line)
