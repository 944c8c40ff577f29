"""A Jupyter kernel, as a notebook runs one: cells are executed in it, and what they show is collected.

with Kernel(folder) as kernel:
    outputs = kernel.run("1 + 1")
    outputs.results        # [{"text/plain": "2"}]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from jupyter_client.manager import KernelManager

SECONDS = 120
"""Between two messages of a cell."""


@dataclass
class Outputs:
    """What a cell has shown.

    Attributes:
        displays: by display id, the bundles (media type to data) in the order in which they came.
        results: those of the cell's last expression.
        streams: text, by `stdout` and `stderr`.
        error: name and value of the exception that ended the cell.
    """

    displays: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    results: list[dict[str, str]] = field(default_factory=list)
    streams: dict[str, str] = field(default_factory=dict)
    error: tuple[str, str] | None = None

    @property
    def html(self) -> str:
        """What the only display shows in the end."""
        (bundles,) = self.displays.values()
        return bundles[-1]["text/html"]

    @property
    def everything(self) -> str:
        """All data and text, of every update."""
        bundles = [bundle for bundles in (*self.displays.values(), self.results) for bundle in bundles]
        return "".join([*(text for bundle in bundles for text in bundle.values()), *self.streams.values()])

    def add(self, kind: str, content: dict[str, Any]) -> None:
        """A message of the kernel."""
        if kind in ("display_data", "update_display_data"):
            name = content["transient"]["display_id"]
            assert (kind == "display_data") == (name not in self.displays), "one output, and then its updates"
            self.displays.setdefault(name, []).append(content["data"])
        elif kind == "execute_result":
            self.results.append(content["data"])
        elif kind == "stream":
            self.streams[content["name"]] = self.streams.get(content["name"], "") + content["text"]
        elif kind == "error":
            self.error = content["ename"], content["evalue"]


class Kernel:
    """See the module's docstring. Its Python is that of the tests."""

    def __init__(self, folder: Path) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self._client = self.manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code: str, *, interrupt_when: Callable[[str], bool] | None = None) -> Outputs:
        """Execute a cell; Ctrl-C is sent once the HTML of a display is so."""
        outputs = Outputs()
        for kind, content in self._messages(self._client.execute(code)):
            outputs.add(kind, content)
            html = content.get("data", {}).get("text/html", "") if kind.endswith("display_data") else ""
            if interrupt_when is not None and interrupt_when(html):
                interrupt_when = None
                self.manager.interrupt_kernel()
        return outputs

    def _messages(self, request: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The messages about a request, until the kernel is idle."""
        while True:
            message = self._client.get_iopub_msg(timeout=SECONDS)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return
            yield kind, content
