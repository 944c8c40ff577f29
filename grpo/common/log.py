"""The project's logger, and where its lines go while a view is open.

    logger.info("the run that was in runs/mine is now runs/mine.1")
    with log_to(view.note):
        ...                             # every line of the logger is shown by the view
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("rankup")
"""For everything a user should read besides metrics. INFO: a note; WARNING: something failed and the run continues."""


class _CallHandler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


@contextmanager
def log_to(show: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, pass every message of the logger (INFO and above) to `show`.

    Blocks nest: only the innermost one shows a message. Handlers that a user attached to this logger get it too; those of the
    root logger do not, which would print it a second time.
    """
    handlers, level, propagate, disabled = logger.handlers[:], logger.level, logger.propagate, logger.disabled
    logger.handlers = [*(one for one in handlers if not isinstance(one, _CallHandler)), _CallHandler(show)]
    logger.propagate = logger.disabled = False  # `logging.config` disables the loggers that exist
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
        logger.setLevel(level)
