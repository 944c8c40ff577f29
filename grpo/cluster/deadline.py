"""Ends a worker that hangs.

    deadline = Deadline(1800.0, report)
    deadline.start()
    deadline.extend()           # after every collective
    deadline.stop()
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable

REPORT_SECONDS = 2.0
"""How long a worker that hangs gets to report it."""


class Deadline:
    """Ends this process, after writing every thread's stack to standard error, when `extend` was not called for too long.

    This works without the interpreter: what hangs (an engine, a network) may never release the GIL. `report` is called before,
    if the interpreter still runs.
    """

    def __init__(self, seconds: float, report: Callable[[], None]) -> None:
        self._seconds = seconds
        self._report = report
        self._last = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Require a call of `extend` within the time, from now on."""
        self._last = time.monotonic()
        self._thread.start()
        self.extend()

    def extend(self) -> None:
        """Restart the time. Does nothing before `start`."""
        if self.is_running:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self._seconds + REPORT_SECONDS, exit=True)

    def stop(self) -> None:
        """Require nothing any more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.01, self._last + self._seconds - time.monotonic())):
            if time.monotonic() >= self._last + self._seconds:
                self._report()
                return
