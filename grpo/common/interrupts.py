"""SIGINT (Ctrl-C) and SIGTERM during a run: the first requests a stop, the second ends the process immediately; in a notebook,
a second Ctrl-C raises KeyboardInterrupt.

    interrupts = Interrupts()
    with interrupts.handled(), interrupts.deferred():
        step()                              # a signal here is only recorded
        interrupts.stop_if_requested()      # and raises RunInterrupted here
        with interrupts.interruptible():
            evaluate()                      # a signal here raises immediately: an evaluation can be repeated
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from ...rewards.contract import Interruption
from .log import logger

SHOW_CURSOR = b"\x1b[?25h\n"


class RunInterrupted(Interruption):
    """A signal ended the run. As a SystemExit it also ends a script, with status 0 once everything is saved. In a notebook,
    `GRPOTrainer` raises KeyboardInterrupt for Ctrl-C instead.

    Attributes:
        signal: name of the signal, such as SIGINT.
        checkpoint: folder of the last checkpoint; None before the first step.
        code: exit status: 0 if everything is saved, else 128 plus the signal's number, as for a process killed by it.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number.name
        self.checkpoint: Path | None = None

    def saved(self, checkpoint: Path | None) -> Self:
        """The run can be resumed from `checkpoint`; None: before the first step, when there is nothing to save."""
        self.checkpoint = checkpoint
        self.code = 0
        return self


class Interrupts:
    """Handles signals, see the module's docstring. A deferred signal is logged, from another thread."""

    def __init__(self) -> None:
        self._requested: signal.Signals | None = None
        self._is_deferred = False
        self._process = os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle both signals inside the block. Python allows that in the main thread only; in others nothing changes.

        An ignored signal stays ignored: shells ignore SIGINT for commands in the background.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._process = os.getpid()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # None: a handler installed by C code, which Python cannot restore.
        handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in handled:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._requested = None  # too late to have an effect
            for number in handled:
                signal.signal(number, before[number])

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record a signal inside the block, until `stop_if_requested` or `interruptible`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside a `deferred` block: raise RunInterrupted as soon as a signal arrives, or now if one was recorded."""
        self.stop_if_requested()
        was_deferred, self._is_deferred = self._is_deferred, False
        try:
            yield
        finally:
            self._is_deferred = was_deferred

    @property
    def requested(self) -> signal.Signals | None:
        """The signal that was recorded; None if no stop was requested."""
        return self._requested

    def request(self) -> None:
        """Request a stop without a signal to this process, for example because another worker received one."""
        self._requested = self._requested or signal.SIGTERM

    def stop_if_requested(self) -> None:
        """Raise RunInterrupted if a stop was requested."""
        if self._requested is not None:
            raise RunInterrupted(self._requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A process forked by a reward function inherits this handler, and `multiprocessing` ends its processes by SIGTERM.
        is_forked = os.getpid() != self._process
        if self._requested is not None and not is_forked and number == signal.SIGINT and is_interactive():
            raise KeyboardInterrupt
        if self._requested is not None or is_forked:
            _end_process(number, show_cursor=not is_forked)
        self._requested = signal.Signals(number)
        if not self._is_deferred:
            raise RunInterrupted(self._requested)
        again = "Ctrl-C again" if self._requested is signal.SIGINT else "a second signal"
        verb = "stops" if is_interactive() else "quits"
        text = f"{self._requested.name}: finishing this step, then saving; {again} {verb} now"
        # In a thread: the signal may have interrupted a write to the same stream, and a nested write would fail.
        threading.Thread(target=logger.info, args=(text,)).start()


def is_interactive() -> bool:
    """Whether a person types into this interpreter (a notebook, a prompt), which an interrupted run must leave usable."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _end_process(number: int, *, show_cursor: bool) -> None:
    """End by the signal itself, as shells and schedulers expect. Rich cannot show the cursor, since a lock may be held."""
    if show_cursor and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container (pid 1) is not killed by the signal
