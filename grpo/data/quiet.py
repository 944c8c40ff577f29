"""Silence around the library `datasets`."""

import contextlib
import logging
from collections.abc import Iterator

import datasets
import huggingface_hub.utils

_SILENT = logging.CRITICAL + 1


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn off progress bars and warnings of both libraries inside the block; errors are still raised."""
    with contextlib.ExitStack() as restore:
        for bars in (datasets.utils, huggingface_hub.utils):
            if not bars.are_progress_bars_disabled():
                restore.callback(bars.enable_progress_bars)
                bars.disable_progress_bars()
        for loggers in (datasets.utils.logging, huggingface_hub.utils.logging):
            restore.callback(loggers.set_verbosity, loggers.get_verbosity())
            loggers.set_verbosity(_SILENT)
        yield
