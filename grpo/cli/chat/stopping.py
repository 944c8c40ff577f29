"""Ctrl-C while answers are sampled: the first stops them between two steps of the engine, the second ends the process.

    with stoppable() as raise_if_stopped:
        session.ask(message, lambda progress: raise_if_stopped())
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818  # it is no error
    """The user has stopped the answers."""


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Inside the block, SIGINT is recorded; calling what the block gets raises `Stopped` then. A second one raises
    KeyboardInterrupt at once, such as in a tool that hangs.

    An exception within a step of vLLM would leave its scheduler in between. Python handles signals in the main thread only; in
    others nothing is recorded.
    """
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    def raise_if_stopped() -> None:
        if requested:
            raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield raise_if_stopped
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield raise_if_stopped
    finally:
        signal.signal(signal.SIGINT, before)
