"""What a chat shows: two columns in a wide terminal, one below the other in a narrow one, plain lines elsewhere.

    screen = make_screen()
    with screen.answering(session) as watch:
        exchange = session.ask(message, watch)
    screen.show(session, exchange)

While answers are sampled, their last lines are redrawn in place; then the complete ones stay in the scrollback. What a model
writes is never interpreted as markup or terminal control.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...display.view_text import dialogue, harmless
from .answers import Answer
from .lines import PROMPT
from .session import ChatSession, Exchange, Progress, Side, Watch
from .stopping import Stopped, stoppable

WIDE = 80
"""Columns of a terminal in which two answers are side by side."""
GAP = 3
SECONDS_PER_FRAME = 1 / 15
LINES_AROUND = 4
"""Of a terminal, that answers in progress leave free: headings and the prompt."""
STOPPED = "stopped: the conversation goes on without this message"
ENDINGS = {
    "abort": "stopped by the engine",
    "turns": "stopped: no more calls (rollout.max_tool_calling_iterations)",
    "failed": "failed",
}
STYLES: Mapping[Side, str] = {"base": "bold", "trained": "bold cyan"}


class Screen(Protocol):
    """See the module's docstring."""

    def note(self, text: str) -> None:
        """Something about the chat, or what a command answers."""

    def error(self, text: str) -> None:
        """Why something could not be done."""

    def asked(self, message: str) -> None:
        """A message that nobody typed here."""

    def answering(self, session: ChatSession) -> AbstractContextManager[Watch]:
        """A context in which answers are sampled. Ctrl-C shows what there is, and raises `Stopped`."""
        ...

    def show(self, session: ChatSession, exchange: Exchange) -> None:
        """Complete answers."""


def make_screen() -> Screen:
    """For standard output."""
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    can_redraw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return TerminalScreen(console) if can_redraw else LineScreen()


def heading(session: ChatSession, side: Side, checkpoint: str) -> str:
    """Who answers: `base`, `trained (step 20)`, or the name of a model that is alone."""
    if session.target.adapters is None:
        return session.target.name
    return side if side == "base" else f"trained ({checkpoint})"


def ending(exchange: Exchange, answer: Answer) -> str:
    """How long an answer is, and why it ends where it does."""
    count = f"{answer.num_tokens} token{'' if answer.num_tokens == 1 else 's'}"
    if answer.finish_reason == "length":
        is_max = answer.num_tokens >= exchange.settings.max_tokens
        return f"{count}, cut off: " + ("/max allows more" if is_max else "there is no more room for tokens")
    reason = ENDINGS.get(answer.finish_reason)
    return count if reason is None else f"{count}, {reason}"


def earlier_lines(answer: Answer) -> list[tuple[str, str]]:
    """Who said what before the text of the answer: calls and results."""
    return dialogue(answer.messages[:-1] if answer.text else answer.messages) if len(answer.messages) > 1 else []


# --------------------------------------------------------------------------------------------------------------- lines


class LineScreen:
    """Plain lines, for pipes and scripts."""

    def note(self, text: str) -> None:
        """See `Screen`."""
        self._print(text)

    def error(self, text: str) -> None:
        """See `Screen`."""
        self._print(f"error: {text}")

    def asked(self, message: str) -> None:
        """See `Screen`."""
        self._print(PROMPT + message)

    @contextmanager
    def answering(self, session: ChatSession) -> Iterator[Watch]:
        """See `Screen`."""
        with stoppable() as check:
            try:
                yield lambda progress: check()
            except Stopped:
                self._print(STOPPED)
                raise

    def show(self, session: ChatSession, exchange: Exchange) -> None:
        """See `Screen`."""
        for side, answer in exchange.answers.items():
            self._print(f"{heading(session, side, exchange.checkpoint)} [{ending(exchange, answer)}]:")
            lines = [f"{speaker}: {said}" for speaker, said in earlier_lines(answer)]
            for line in [*lines, *(answer.text or "(nothing)").split("\n")]:
                self._print(f"  {line}".rstrip())

    def _print(self, text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(harmless(text).encode(encoding, "replace").decode(encoding), flush=True)


# ------------------------------------------------------------------------------------------------------------ terminal


class TerminalScreen:
    """Columns, or blocks below each other, with answers that grow."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        """See `Screen`."""
        self._console.print(Text(harmless(text), style="dim"))

    def error(self, text: str) -> None:
        """See `Screen`."""
        self._console.print(Text(harmless(text), style="red"))

    def asked(self, message: str) -> None:
        """See `Screen`."""
        self._console.print(Text(PROMPT + harmless(message)))

    @contextmanager
    def answering(self, session: ChatSession) -> Iterator[Watch]:
        """See `Screen`."""
        last: list[Progress] = []
        drawn = 0.0
        with Live(console=self._console, auto_refresh=False, transient=True) as live, stoppable() as check:

            def watch(progress: Progress) -> None:
                nonlocal drawn
                last[:] = [progress]
                check()
                if time.monotonic() - drawn >= SECONDS_PER_FRAME:
                    live.update(self._growing(session, progress), refresh=True)
                    drawn = time.monotonic()

            try:
                yield watch
            except Stopped:
                live.stop()
                if last:
                    self._console.print(self._growing(session, last[0], complete=True))
                self._console.print(Text(STOPPED, style="yellow"))
                raise

    def show(self, session: ChatSession, exchange: Exchange) -> None:
        """See `Screen`."""
        blocks = []
        for side, answer in exchange.answers.items():
            body = Text()
            for speaker, said in earlier_lines(answer):
                body.append(f"{'→' if speaker == 'assistant' else '←'} {said}\n", style="magenta")
            body.append(harmless(answer.text) if answer.text else "(nothing)", style="" if answer.text else "dim")
            title = Text(harmless(heading(session, side, exchange.checkpoint)), style=STYLES[side])
            blocks.append([title, body, Text(ending(exchange, answer), style="dim")])
        self._console.print(self._arranged(blocks))
        self._console.print()

    def _growing(self, session: ChatSession, progress: Progress, *, complete: bool = False) -> RenderableType:
        """Answers in progress: as many of their last lines as there is room for."""
        is_beside = self._is_beside(len(progress.sides))
        width = self._width(len(progress.sides))
        room = self._console.height - LINES_AROUND
        if not is_beside:
            room = room // len(progress.sides) - 1
        blocks = []
        for side in progress.sides:
            title = Text(harmless(heading(session, side, session.checkpoint)), style=STYLES[side])
            lines = Text(harmless(progress.text(side))).wrap(self._console, width)
            kept = lines if complete else lines[-max(1, room) :]
            blocks.append([title, Text("\n").join(kept)])
        return self._arranged(blocks)

    def _arranged(self, blocks: list[list[Text]]) -> RenderableType:
        """A block for each side, beside each other if there is room."""
        if not self._is_beside(len(blocks)):
            return Group(*(text for block in blocks for text in block))
        table = Table.grid(padding=(0, GAP, 0, 0))
        for _ in blocks:
            table.add_column(width=self._width(len(blocks)), overflow="fold")
        for row in zip(*blocks, strict=True):
            table.add_row(*row)
        return table

    def _is_beside(self, count: int) -> bool:
        return count > 1 and self._console.width >= WIDE

    def _width(self, count: int) -> int:
        """Of a block."""
        return (self._console.width - GAP * count) // count if self._is_beside(count) else self._console.width
