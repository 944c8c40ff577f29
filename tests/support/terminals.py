"""A command in a real terminal (tmux): typed at, and looked at.

    with Terminal(["rankup", "chat", "runs/mine"], width=100, height=30, cwd=tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("hello")
        terminal.screen()           # the lines that are shown
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

TMUX = shutil.which("tmux")
_NUMBERS = itertools.count()


class Terminal:
    """A window of tmux, with a server of its own. `cwd`: the working directory of the command."""

    def __init__(self, command: Sequence[str | Path], *, width: int, height: int, cwd: Path) -> None:
        self.cwd = cwd
        self._name = f"rankup-test-{os.getpid()}-{next(_NUMBERS)}"
        variables = [f"{name}={value}" for name, value in _environment().items()]
        # tmux 3.3 loses the exit status of a pane now and then, so a shell keeps it. It must outlive a Ctrl-C of the command.
        self._status = cwd / f".{self._name}.status"
        script = f'trap : INT; "$@"; echo $? > {shlex.quote(str(self._status))}'
        words = ["env", "-u", "COLUMNS", "-u", "LINES", *variables, "sh", "-c", script, "sh", *map(str, command)]
        size = ["-x", str(width), "-y", str(height), "-c", str(cwd)]
        self._tmux("-f", os.devnull, "new-session", "-d", *size, "sleep 600")  # a window with these options, for the command
        for option in (["-g", "status", "off"], ["-g", "remain-on-exit", "on"], ["-g", "window-size", "manual"]):
            self._tmux("set-option", *option)
        self._tmux("resize-window", "-x", str(width), "-y", str(height))
        self._tmux("respawn-pane", "-k", "-c", str(cwd), shlex.join(words))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tmux("kill-server")

    def type(self, text: str, *keys: str) -> None:
        """Type a text, and then keys by tmux's names; Enter if none are given."""
        self._tmux("send-keys", "-l", text)
        self._tmux("send-keys", *(keys or ("Enter",)))

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names, such as C-c."""
        self._tmux("send-keys", *keys)

    def paste(self, text: str) -> None:
        """Paste a text as terminals do that mark it (bracketed paste)."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p")

    def screen(self) -> list[str]:
        """The lines that are shown."""
        return self._tmux("capture-pane", "-p").splitlines()

    def scrollback(self) -> str:
        """Everything that was printed and stayed."""
        return self._tmux("capture-pane", "-p", "-S", "-")

    def wait_for(self, text: str, *, timeout: float = 90.0) -> list[str]:
        """The screen once it shows a text."""
        self.wait_until(lambda: any(text in line for line in self.screen()), f"{text!r} is not shown", timeout=timeout)
        return self.screen()

    def wait_until(self, holds: Callable[[], bool], otherwise: str, *, timeout: float = 90.0) -> None:
        """Wait until something holds. tmux tells of no event, so it is asked again and again."""
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, "\n".join([otherwise, *self.screen()])
            time.sleep(0.02)

    @property
    def status(self) -> int | None:
        """Exit status of the command; None: it is running."""
        text = self._status.read_text() if self._status.exists() else ""
        return int(text) if text.endswith("\n") else None

    def _tmux(self, *words: str) -> str:
        command = [TMUX or "tmux", "-L", self._name, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def _environment() -> dict[str, str]:
    kept = ("PATH", "PYTHONPATH", "HOME", "OMP_NUM_THREADS", "XDG_CACHE_HOME", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C.UTF-8"}
