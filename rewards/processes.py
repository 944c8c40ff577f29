"""Persistent processes that call reward functions, and can be killed.

    pool = WorkerPool([Portable(name="length", spec="my.py:length")], RewardsConfig(num_workers=2, timeout=10))
    future = pool.submit(0, pickle.dumps(inputs))     # returns immediately; calls function 0
    future.result().rewards                           # [3.0, 5.0]; a Failure has a `reason` instead
    pool.close()

A process that exceeds its time limit is killed with its children and replaced, and so is one that died; the other processes
are not affected. Output of the functions is printed here, line by line.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from .config import RewardsConfig
from .contract import Failure
from .pool import Answer, Pool
from .portable import Portable
from .worker import Setup, main

MAX_WORKERS = 8
"""Default limit on processes: the trainer needs the machine as well."""

START_TIMEOUT = 300.0
"""Seconds for loading the functions; imports can be slow on a busy machine."""

MAX_WAIT = 1.0
"""Seconds; a cancelled Ray task is interrupted between two waits."""

EXIT_TIMEOUT = 2.0
"""Seconds for a process that has closed its socket to exit."""

MAX_LINE = 65536
"""Bytes; longer lines of output are printed in parts."""

KEPT_OUTPUT = 2000
"""Characters: the end of a process's output, which is reported when it dies."""


class WorkerPool(Pool):
    """`config.num_workers` processes with the same functions. See the module's docstring.

    Args:
        functions: loaded by the processes; `submit` takes an index into it.
        config: `num_workers` (None: one per core, at most `MAX_WORKERS`), `timeout`, `retries` and `memory_gib`.
    """

    def __init__(self, functions: Sequence[Portable], config: RewardsConfig) -> None:
        setup = Setup(functions=tuple(functions), path=tuple(sys.path), memory_bytes=config.memory_bytes)
        num_lanes = config.num_workers or min(MAX_WORKERS, os.cpu_count() or 1)
        super().__init__(lambda: Worker(setup, timeout=config.timeout), num_lanes=num_lanes, retries=config.retries)


class Worker:
    """A process that answers calls, and is replaced when it fails. It dies with the thread that created this object.

    Args:
        setup: loaded first by a process.
        timeout: seconds for one call; None: no limit.
    """

    def __init__(self, setup: Setup, *, timeout: float | None) -> None:
        self._setup, self._timeout = pickle.dumps(setup), timeout
        self._lock = threading.Lock()
        self._is_stopped = False
        self._process: _Process | None = None
        self._start()

    def answer(self, number: int, inputs: bytes) -> Answer:
        """Call function `number` with pickled `Inputs`. Never raises what the function raises."""
        if self._process is None:
            self._start()
        process = self._process
        if process is None:
            return Failure(reason="no process could be started for it")
        try:
            answer = process.call(number, inputs, self._timeout)
        except BaseException:  # a late answer must not be taken for the answer to another call
            self.close()
            raise
        if process.is_broken:
            self.close()
            self._start()
        return answer

    def stop(self) -> None:
        """From another thread: kill the process without starting another one."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Kill the process and its children."""
        if self._process is not None:
            self._process.kill()
            self._process.release()
            self._process = None

    def _start(self) -> None:
        """Start a process, unless `stop` was called or the system has no process to give."""
        with self._lock:
            if not self._is_stopped:
                with contextlib.suppress(OSError):  # too many processes or descriptors: the next call tries again
                    self._process = _Process(self._setup)


class _Process:
    """One reward process and its recent output. `is_broken`: it must be replaced."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        # -P: the working directory must not shadow installed packages. -u: output is not buffered.
        command = [sys.executable, "-P", "-u", "-c", f"from {main.__module__} import main; main({theirs.fileno()})"]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a new process group: killed with its children, and not interrupted by Ctrl-C
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._death = os.pidfd_open(self._process.pid)  # readable once it is dead, even while a child holds its descriptors
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._line, self._last_output, self._has_output = b"", "", True
        self._is_ready = False
        self.is_broken = False
        with contextlib.suppress(OSError):  # it died already: the first call reports it
            self._connection.send_bytes(setup)

    def call(self, number: int, inputs: bytes, timeout: float | None) -> Answer:
        """Wait for the answer to one call. The time limit starts once the functions are loaded."""
        if not self._is_ready:
            answer = self._receive(START_TIMEOUT, waiting_for="not loaded")
            if isinstance(answer, Failure):
                return answer
            self._is_ready = True
        try:
            self._connection.send_bytes(number.to_bytes(4, "big"))
            self._connection.send_bytes(inputs)
        except OSError:
            return self._died()
        return self._receive(timeout, waiting_for="no answer")

    def kill(self) -> None:
        """Kill the process and its children; safe from another thread, and more than once."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:  # not `poll()`: that would reap it, and its pid may be reused
                os.killpg(self._process.pid, signal.SIGKILL)

    def release(self) -> None:
        """Reap the killed process and close its descriptors."""
        self._process.wait()
        self._forward_output(chunks=4)
        self._end_line()
        self._connection.close()
        self._output.close()
        os.close(self._death)

    def _receive(self, timeout: float | None, *, waiting_for: str) -> Answer:
        """The next message, or a Failure if none comes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = MAX_WAIT if deadline is None else deadline - time.monotonic()
            if left <= 0:
                self.is_broken = True
                self.kill()
                return Failure(reason=f"{waiting_for} in {timeout:g} s: its process was killed")
            sources = [self._connection, self._death, *([self._output] if self._has_output else [])]
            ready = wait(sources, min(left, MAX_WAIT))
            if self._output in ready:
                self._forward_output(chunks=1)  # only one: a function that never stops printing has a time limit too
            if self._connection in ready:
                return self._message()
            if self._death in ready:
                return self._died()

    def _message(self) -> Answer:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            return self._died()
        self._forward_output(chunks=4)
        return message

    def _died(self) -> Failure:
        self.is_broken = True
        if not wait([self._death], EXIT_TIMEOUT):
            self.kill()
            return Failure(reason="it closed its socket but did not exit: its process was killed", details=self._last_output)
        self.kill()  # its children
        code = self._process.wait()
        self._forward_output(chunks=4)
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return Failure(reason=f"its process died ({how})", details=self._last_output)

    def _forward_output(self, *, chunks: int) -> None:
        """Print the complete lines of at most `chunks` reads of the process's output."""
        for _ in range(chunks):
            chunk = self._read()
            if not chunk:
                self._has_output = self._has_output and chunk is None  # after end of file it is always readable
                return
            self._last_output = (self._last_output + chunk.decode(errors="replace"))[-KEPT_OUTPUT:]
            *lines, self._line = (self._line + chunk).split(b"\n")
            for line in lines:
                _print(line)
            if len(self._line) > MAX_LINE:
                self._end_line()

    def _end_line(self) -> None:
        if self._line:
            _print(self._line)
            self._line = b""

    def _read(self) -> bytes | None:
        """Some output; None if there is none now, empty at end of file."""
        try:
            return os.read(self._output.fileno(), 65536)
        except BlockingIOError:
            return None


def _print(line: bytes) -> None:
    """Print a line, with replacements for what the output's encoding lacks: printing must not fail a call."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = line.decode(errors="replace").encode(encoding, "replace").decode(encoding)
    with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed file
        print(text, flush=True)
