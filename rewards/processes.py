"""Persistent processes that call reward functions, and can be killed.

    pool = WorkerPool({"length": Portable(spec="my.py:length")}, RewardsConfig(num_workers=2, timeout=10))
    future = pool.submit("length", pickle.dumps(inputs))     # returns immediately
    future.result().rewards                                  # [3.0, 5.0]; a Failure has a `reason` instead
    pool.close()

A process that exceeds its time limit is killed with its children and replaced, and so is one that died; the other processes
are not affected. Output of the functions is printed here, line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from .config import RewardsConfig
from .contract import Failure
from .pool import Answer, Pool
from .portable import Portable
from .worker import SIZE_BYTES, main

MAX_WORKERS = 8
"""Default limit on processes: the trainer needs the machine as well."""

START_TIMEOUT = 300.0
"""Seconds for loading the functions; imports can be slow on a busy machine."""

EXIT_TIMEOUT = 2.0
"""Seconds for a process that has closed its socket to exit."""

LAST_ANSWER_TIMEOUT = 0.1
"""Seconds to read the answer of a process that has died."""

CHUNK = 65536
"""Bytes that are read at once; longer lines of output are printed in parts."""

KEPT_OUTPUT = 2000
"""Characters: the end of a process's output, which is reported when it dies."""


class WorkerPool(Pool):
    """`config.num_workers` processes with the same functions. See the module's docstring.

    Args:
        functions: loaded by the processes, by name.
        config: `num_workers` (None: one per core, at most `MAX_WORKERS`), `timeout`, `retries` and `memory_gib`.
    """

    def __init__(self, functions: Mapping[str, Portable], config: RewardsConfig) -> None:
        super().__init__(retries=config.retries)
        self._folder = TemporaryDirectory(prefix="rankup-rewards-")  # for files that were sent here
        unpacked = {name: portable.unpacked(Path(self._folder.name)) for name, portable in functions.items()}
        self._setup = pickle.dumps((unpacked, list(sys.path), config.memory_gib))
        self._timeout = config.timeout
        self._idle: asyncio.Queue[_Process | None] = asyncio.Queue()
        self.run(self._start_all(config.num_workers or min(MAX_WORKERS, os.cpu_count() or 1)))

    async def answer(self, name: str, inputs: bytes) -> Answer:
        process = await self._idle.get() or self._start()
        if process is None:
            self._idle.put_nowait(None)
            return Failure(reason="no process could be started for it")
        answer: Answer | None = None
        try:
            answer = await process.call(pickle.dumps((name, inputs)), self._timeout)
            return answer
        finally:
            if isinstance(answer, bytes):
                self._idle.put_nowait(process)
            else:
                await self._discard(process, replace=answer is not None)

    async def _discard(self, process: _Process, *, replace: bool) -> None:
        """Close a process that has failed, or whose call was cancelled: the next call must not get its answer."""
        try:
            await process.close()
        finally:
            self._idle.put_nowait(self._start() if replace else None)

    async def _start_all(self, num_workers: int) -> None:
        for _ in range(num_workers):
            self._idle.put_nowait(self._start())

    def _start(self) -> _Process | None:
        with contextlib.suppress(OSError):  # too many processes or descriptors: the next call tries again
            return _Process(self._setup)

    async def _finish(self) -> None:
        await super()._finish()
        while not self._idle.empty():
            if process := self._idle.get_nowait():
                await process.close()
        self._folder.cleanup()


class _Process:
    """One reward process. It dies with the thread of the event loop that created it."""

    def __init__(self, setup: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket, theirs = socket.socketpair()
        with theirs:
            # -P: the working directory must not shadow installed packages. -u: output is not buffered.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", f"from {main.__module__} import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a new process group: killed with its children, and not interrupted by Ctrl-C
            )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._line, self._last_output = b"", ""
        self._pidfd = os.pidfd_open(self._process.pid)  # readable once it is dead, even while a child holds its descriptors
        self._death = self._loop.create_future()
        os.set_blocking(self._output.fileno(), False)
        self._socket.setblocking(False)
        self._loop.add_reader(self._pidfd, self._has_died)
        self._loop.add_reader(self._output, self._forward_output)
        self._loaded = asyncio.create_task(self._exchange(setup, START_TIMEOUT, waiting_for="not loaded"))

    async def call(self, message: bytes, timeout: float | None) -> Answer:
        """The answer to one call; a Failure if the process must be closed. The time starts once the functions are loaded."""
        loaded = await self._loaded
        return loaded if isinstance(loaded, Failure) else await self._exchange(message, timeout, waiting_for="no answer")

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:  # not `poll()`: that would reap it, and its pid may be reused
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Kill it, reap it, and close its descriptors."""
        self.kill()
        self._loaded.cancel()
        try:
            await asyncio.wait({self._loaded, self._death})
        finally:
            self._process.wait()
            self._forward_output(chunks=4)
            self._end_line()
            self._loop.remove_reader(self._output)
            self._socket.close()
            self._output.close()
            os.close(self._pidfd)

    def _has_died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._death.set_result(None)

    async def _exchange(self, message: bytes, timeout: float | None, *, waiting_for: str) -> Answer:
        """Send a message and receive the answer, or a Failure if none comes."""
        answer = asyncio.create_task(self._send_and_receive(message))
        try:
            await asyncio.wait({answer, self._death}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                await asyncio.wait({answer}, timeout=LAST_ANSWER_TIMEOUT)
            elif not answer.done():
                return Failure(reason=f"{waiting_for} in {timeout:g} s: its process was killed")
            with contextlib.suppress(EOFError, OSError):
                if answer.done():
                    return answer.result()
            return await self._failure()
        finally:
            self._forward_output(chunks=4)
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _send_and_receive(self, message: bytes) -> bytes:
        await self._loop.sock_sendall(self._socket, len(message).to_bytes(SIZE_BYTES, "big") + message)
        return await self._receive(int.from_bytes(await self._receive(SIZE_BYTES), "big"))

    async def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            chunk = await self._loop.sock_recv(self._socket, min(CHUNK, size - len(received)))
            if not chunk:
                raise EOFError
            received += chunk
        return bytes(received)

    async def _failure(self) -> Failure:
        """Why a process that has closed its socket, or is dead, gives no answer."""
        await asyncio.wait({self._death}, timeout=EXIT_TIMEOUT)
        if not self._death.done():
            return Failure(reason="it closed its socket but did not exit: its process was killed", details=self._last_output)
        self.kill()  # its children
        code = self._process.wait()
        self._forward_output(chunks=4)
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return Failure(reason=f"its process died ({how})", details=self._last_output)

    def _forward_output(self, chunks: int = 1) -> None:
        """Print the complete lines of some output; by default of little, as a function may print without end."""
        for _ in range(chunks):
            try:
                chunk = os.read(self._output.fileno(), CHUNK)
            except BlockingIOError:
                return
            if not chunk:
                self._loop.remove_reader(self._output)  # at its end it is always readable
                return
            self._last_output = (self._last_output + chunk.decode(errors="replace"))[-KEPT_OUTPUT:]
            *lines, self._line = (self._line + chunk).split(b"\n")
            for line in lines:
                _print(line)
            if len(self._line) > CHUNK:
                self._end_line()

    def _end_line(self) -> None:
        if self._line:
            _print(self._line)
            self._line = b""


def _print(line: bytes) -> None:
    """Print a line, with replacements for what the output's encoding lacks: printing must not fail a call."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = line.decode(errors="replace").encode(encoding, "replace").decode(encoding)
    with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed file
        print(text, flush=True)
