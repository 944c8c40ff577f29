"""SIGINT (Ctrl-C) and SIGTERM while a run goes on: the first asks it to stop, the second ends the process at once.

    interrupts = Interrupts(view.note)
    with interrupts.handled(), interrupts.deferred():
        step()                              # a signal here is remembered
        interrupts.stop_if_asked()          # and raises RunInterrupted here
        with interrupts.at_once():
            evaluate()                      # here it raises at once: what can be repeated need not be waited for
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

SHOW_CURSOR = b"\x1b[?25h\n"


class RunInterrupted(SystemExit):
    """A signal has ended the run. As a SystemExit it ends a script too, with status 0 once everything is saved.

    Attributes:
        signal: the signal's name.
        checkpoint: where the run was saved; None before its first step.
        code: 0 where everything is saved, else 128 and the signal's number, as of a process that the signal has killed.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number.name
        self.checkpoint: Path | None = None

    def saved(self, checkpoint: Path | None) -> Self:
        """The run is in `checkpoint` and can go on from there; None: before the first step, where nothing is lost."""
        self.checkpoint = checkpoint
        self.code = 0
        return self


class Interrupts:
    """Answers signals. See the module's docstring. `say` shows a line to the user; it may be called from another thread."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._asked: signal.Signals | None = None
        self._is_deferred = False
        self._process = os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Answer both signals inside the block. Elsewhere than in the main thread Python cannot, and nothing changes.

        A signal that is ignored stays so: a shell wants that for SIGINT of what it runs in the background.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._process = os.getpid()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # None: a handler of C, which Python could not put back.
        answered = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in answered:
            signal.signal(number, self._answer)
        try:
            yield
        finally:
            self._asked = None  # what was not answered by now came too late to be
            for number in answered:
                signal.signal(number, before[number])

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember a signal inside the block, until `stop_if_asked` or `at_once`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside a `deferred` block: raise RunInterrupted wherever the signal finds us, and now if one was remembered."""
        self.stop_if_asked()
        was_deferred, self._is_deferred = self._is_deferred, False
        try:
            yield
        finally:
            self._is_deferred = was_deferred

    @property
    def asked(self) -> signal.Signals | None:
        """The signal that was remembered."""
        return self._asked

    def ask(self) -> None:
        """Remember a wish to stop that came in another way than by a signal to this process."""
        self._asked = self._asked or signal.SIGTERM

    def stop_if_asked(self) -> None:
        """Raise RunInterrupted if a signal was remembered."""
        if self._asked is not None:
            raise RunInterrupted(self._asked)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        # A process that a reward function has forked inherits this; `multiprocessing` ends its processes by SIGTERM.
        if self._asked is not None or os.getpid() != self._process:
            _end_process(number, show_cursor=os.getpid() == self._process)
        self._asked = signal.Signals(number)
        if not self._is_deferred:
            raise RunInterrupted(self._asked)
        # The signal may have come in the middle of a write to the same stream, which no write may interrupt: hence a thread.
        text = f"{self._asked.name}: this step is finished and saved; a second signal ends the run at once"
        threading.Thread(target=self._say, args=(text,)).start()


def _end_process(number: int, *, show_cursor: bool) -> None:
    """Die of the signal, as shells and schedulers expect. No lock can be waited for here, so the cursor is shown by hand."""
    if show_cursor and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container does not die of it
