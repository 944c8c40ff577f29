"""Persistent processes that call reward functions, and can be killed.

    pool = WorkerPool([Portable(name="length", spec="my.py:length")], num_workers=8, timeout=10.0)
    future = pool.submit(0, inputs)           # at once; function 0
    future.result()                           # a Returned, or a Failure that says why there is none
    pool.close()

A process that does not answer in time is killed with its children and replaced; so is one that died. The others do not notice.
What the functions print goes to this process's output, line by line.
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

from .contract import Failure
from .pool import Answer, Pool
from .portable import Portable
from .worker import Setup, main

MOST_WORKERS = 8
"""Processes where nothing else is said: the trainer needs the machine as well."""

START_SECONDS = 300.0
"""A process that has not loaded its functions by then never will; imports can be slow on a machine that is busy."""

LONGEST_WAIT = 1.0
"""Seconds; a task of Ray that is cancelled notices it between two waits."""

DYING_SECONDS = 2.0
"""What a process that has closed its socket gets to end by itself."""

LONGEST_LINE = 65536
"""Bytes after which output is printed without its line's end."""

KEPT_OUTPUT = 2000
"""Last characters of a process's output, told when it dies."""


class WorkerPool(Pool):
    """`num_workers` processes with the same functions. See the module's docstring.

    Args:
        functions: what the processes load; `submit` names them by their place.
        num_workers: processes; None: one a core, at most `MOST_WORKERS`.
        timeout: seconds that one call may take, None: for ever.
        retries: how often a call that failed is tried again.
        memory_bytes: bound on each process's data, None: no bound.
    """

    def __init__(
        self,
        functions: Sequence[Portable],
        *,
        num_workers: int | None = None,
        timeout: float | None = None,
        retries: int = 0,
        memory_bytes: int | None = None,
    ) -> None:
        setup = Setup(functions=tuple(functions), path=tuple(sys.path), memory_bytes=memory_bytes)
        num_lanes = num_workers or min(MOST_WORKERS, os.cpu_count() or 1)
        super().__init__(lambda: Worker(setup, timeout=timeout), num_lanes=num_lanes, retries=retries)


class Worker:
    """A process that answers calls, and is replaced when it breaks. It ends with the thread that has made this.

    Args:
        setup: what a process begins with.
        timeout: seconds that one call may take, None: for ever.
    """

    def __init__(self, setup: Setup, *, timeout: float | None) -> None:
        self._setup, self._timeout = pickle.dumps(setup), timeout
        self._lock = threading.Lock()
        self._is_stopped = False
        self._process: _Process | None = None
        self._start()

    def answer(self, number: int, inputs: bytes) -> Answer:
        """Call function `number` with pickled `Inputs`. Raises nothing of the user's."""
        if self._process is None:
            self._start()
        process = self._process
        if process is None:
            return Failure(reason="no process could be started for it")
        try:
            answer = process.call(number, inputs, self._timeout)
        except BaseException:  # what it may answer yet must not be taken for the answer to another call
            self.close()
            raise
        if process.is_broken:
            self.close()
            self._start()
        return answer

    def stop(self) -> None:
        """From another thread: kill the process; there will be no other."""
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
        """A new process; none once the worker was stopped, or where the system has none to give."""
        with self._lock:
            if not self._is_stopped:
                with contextlib.suppress(OSError):  # too many processes or descriptors: tried again at the next call
                    self._process = _Process(self._setup)


class _Process:
    """One reward process and what it has printed. `is_broken`: it is of no more use."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        # -P: the working directory must not come before the installed packages. -u: what is printed is seen at once.
        command = [sys.executable, "-P", "-u", "-c", f"from {main.__module__} import main; main({theirs.fileno()})"]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: it is killed with its children, and Ctrl-C does not reach it
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._death = os.pidfd_open(self._process.pid)  # readable when it is dead, whoever still holds its descriptors
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._line, self._last_output, self._has_output = b"", "", True
        self._is_ready = False
        self.is_broken = False
        with contextlib.suppress(OSError):  # it died at once: the first call tells
            self._connection.send_bytes(setup)

    def call(self, number: int, inputs: bytes, timeout: float | None) -> Answer:
        """Have a call answered; the time begins when the functions are loaded."""
        if not self._is_ready:
            answer = self._receive(START_SECONDS, waiting_for="not loaded")
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
            if self._process.returncode is None:  # not `poll()`: once it is reaped, the number may be another's
                os.killpg(self._process.pid, signal.SIGKILL)

    def release(self) -> None:
        """Reap the process, which has been killed, and close what belongs to it."""
        self._process.wait()
        self._forward_output(chunks=4)
        self._end_line()
        self._connection.close()
        self._output.close()
        os.close(self._death)

    def _receive(self, timeout: float | None, *, waiting_for: str) -> Answer:
        """The next message; a Failure where none comes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LONGEST_WAIT if deadline is None else deadline - time.monotonic()
            if left <= 0:
                self.is_broken = True
                self.kill()
                return Failure(reason=f"{waiting_for} in {timeout:g} s: its process was killed")
            sources = [self._connection, self._death, *([self._output] if self._has_output else [])]
            ready = wait(sources, min(left, LONGEST_WAIT))
            if self._output in ready:
                self._forward_output(chunks=1)  # no more: a function that prints without end has its limit of time as well
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
        if not wait([self._death], DYING_SECONDS):
            self.kill()
            return Failure(reason="it closed its socket and went on: its process was killed", details=self._last_output)
        self.kill()  # its children; what ended it stands
        code = self._process.wait()
        self._forward_output(chunks=4)
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return Failure(reason=f"its process died ({how})", details=self._last_output)

    def _forward_output(self, *, chunks: int) -> None:
        """Print what the process has printed since the last time, whole lines, at most so many reads of it."""
        for _ in range(chunks):
            chunk = self._read()
            if not chunk:
                self._has_output = self._has_output and chunk is None  # at its end it is always ready to read
                return
            self._last_output = (self._last_output + chunk.decode(errors="replace"))[-KEPT_OUTPUT:]
            *lines, self._line = (self._line + chunk).split(b"\n")
            for line in lines:
                _print(line)
            if len(self._line) > LONGEST_LINE:
                self._end_line()

    def _end_line(self) -> None:
        if self._line:
            _print(self._line)
            self._line = b""

    def _read(self) -> bytes | None:
        """Some output; None where there is none now, empty at its end."""
        try:
            return os.read(self._output.fileno(), 65536)
        except BlockingIOError:
            return None


def _print(line: bytes) -> None:
    """Print a line as far as the output can show it; a call must not fail for what cannot be shown."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = line.decode(errors="replace").encode(encoding, "replace").decode(encoding)
    with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more, a file that was closed
        print(text, flush=True)
