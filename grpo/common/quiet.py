"""Keep progress bars and warnings of other libraries off the terminal while models load and the engine starts."""

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
    """Hold back everything written to standard error, by C++ code too; print it only if the block fails.

    Libraries write progress bars and warnings there (NUMA, missing optional packages) that no argument turns off.
    """
    stream = sys.stderr  # not always file descriptor 2: a live terminal view replaces it
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
    """Set the level of verbose loggers to ERROR until the process ends."""
    for name in ("transformers", "bitsandbytes", "vllm", "torch", "datasets", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
