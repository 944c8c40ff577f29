"""Persistent processes that call reward functions, and can be killed.

    pool = WorkerPool([Portable(name="length", spec="my.py:length")], num_workers=8, timeout=10.0)
    future = pool.submit(0, inputs)           # at once; function 0
    future.result()                           # a Returned, or a Failure that says why there is none
    pool.close()

A thread for each process takes calls from one queue, sends each to its process and waits for the answer. A process that does
not answer in time is killed with its children and replaced; so is one that died. The others do not notice. What the functions
print goes to the trainer's output, line by line.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from .contract import CallResult, Failure, Inputs, Returned, failure_of
from .worker import Portable, Setup, main

START_SECONDS = 300.0
"""A process that has not loaded its functions by then never will; imports can be slow on a machine that is busy."""

LONGEST_WAIT = 3600.0
"""Seconds; the system takes no very long ones."""

DYING_SECONDS = 2.0
"""What a process that has closed its socket gets to end by itself."""

LONGEST_LINE = 65536
"""Bytes after which output is printed without its line's end."""

KEPT_OUTPUT = 2000
"""Last characters of a process's output, told when it dies."""


@dataclass(frozen=True, slots=True)
class _Call:
    number: int
    inputs: bytes
    future: Future[CallResult]


class WorkerPool:
    """`num_workers` processes with the same functions. See the module's docstring.

    Args:
        functions: what the processes load; `submit` names them by their place.
        timeout: seconds that one call may take, None: for ever.
        retries: how often a call that failed is tried again.
        memory_bytes: bound on each process's data, None: no bound.
    """

    def __init__(
        self,
        functions: Sequence[Portable],
        *,
        num_workers: int,
        timeout: float | None = None,
        retries: int = 0,
        memory_bytes: int | None = None,
    ) -> None:
        self._setup = pickle.dumps(Setup(functions=tuple(functions), path=tuple(sys.path), memory_bytes=memory_bytes))
        self._timeout, self._retries = timeout, retries
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"rewards-{number}", daemon=True) for number in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, number: int, inputs: Inputs) -> Future[CallResult]:
        """Queue a call of function `number`. The future's result tells a failure; its exception is none of the user's."""
        return self.submit_pickled(number, pickle.dumps(inputs))

    def submit_pickled(self, number: int, inputs: bytes) -> Future[CallResult]:
        """The same with `Inputs` that are pickled already: several functions get the same."""
        assert not self._is_closed
        future: Future[CallResult] = Future()
        self._calls.put(_Call(number, inputs, future))
        return future

    def close(self) -> None:
        """Kill all processes; calls that have not been answered are cancelled."""
        with self._lock:
            self._is_closed = True
            processes = list(self._processes)
        for process in processes:
            process.kill()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """A thread's life: one process at a time, one call at a time."""
        process = self._start()
        while (call := self._calls.get()) is not None:
            if self._is_closed or not call.future.set_running_or_notify_cancel():
                call.future.cancel()
                continue
            outcome: CallResult = Failure(reason="")
            for _ in range(self._retries + 1):
                process = process or self._start()
                outcome = self._attempt(process, call)
                if process is not None and process.is_broken:
                    self._discard(process)
                    process = self._start()
                if isinstance(outcome, Returned):
                    break
            call.future.set_result(outcome)
        if process is not None:
            self._discard(process)

    def _attempt(self, process: _Process | None, call: _Call) -> CallResult:
        if process is None:
            return Failure(reason="no process could be started for it")
        try:
            outcome = process.call(call, self._timeout)
        except Exception as error:  # whatever it is, this thread has to go on: the caller waits for an answer
            process.is_broken = True
            return failure_of(error)
        return Failure(reason="the scorer was closed") if self._is_closed else outcome

    def _start(self) -> _Process | None:
        """A new process; None once the pool is closed, or where the system has none to give."""
        with self._lock:
            if self._is_closed:
                return None
            try:
                process = _Process(self._setup)
            except OSError:  # too many processes or descriptors: tried again at the next call
                return None
            self._processes.add(process)
            return process

    def _discard(self, process: _Process) -> None:
        process.kill()
        process.release()
        with self._lock:
            self._processes.discard(process)


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

    def call(self, call: _Call, timeout: float | None) -> CallResult:
        """Have a call answered; the time begins when the functions are loaded."""
        if not self._is_ready:
            answer = self._receive(START_SECONDS, waiting_for="not loaded")
            if isinstance(answer, Failure):
                return answer
            self._is_ready = True
        try:
            self._connection.send_bytes(call.number.to_bytes(4, "big"))
            self._connection.send_bytes(call.inputs)
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

    def _receive(self, timeout: float | None, *, waiting_for: str) -> Any:
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

    def _message(self) -> Any:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            return self._died()
        self._forward_output(chunks=4)
        try:
            return pickle.loads(message)
        except Exception as error:  # what `log_extra` was given may fail in any way
            return Failure(reason=f"its answer cannot be read here: {type(error).__name__}: {error}")

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
