"""Keeping other libraries' progress bars and remarks off the terminal while models are loaded and the engine starts."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back everything that is written to standard error, by C++ code too; show it only if the block fails.

    Libraries draw progress bars and print remarks there (NUMA, missing optional packages) that no argument turns off.
    """
    stream = sys.stderr  # not always file descriptor 2: a live terminal view puts its own in place
    stream.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as held, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(held.fileno(), 2)
        try:
            with redirect_stderr(held):
                yield
        except BaseException:
            held.flush()
            held.seek(0)
            os.dup2(saved, 2)
            stream.write(held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def quiet_loggers() -> None:
    """Raise the level of chatty loggers to ERROR, for a command's whole life."""
    for name in ("transformers", "bitsandbytes", "vllm", "torch", "datasets", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
