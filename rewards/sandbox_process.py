"""A process that is read and killed under limits, whatever it does.

    process = subprocess.Popen(["echo", "text"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    with Running(process, output_bytes=999, deadline=time.monotonic() + 30) as running:
        finished = running.finish()         # instead of None, "timeout" or "output"; and the exit code
    finished, running.texts()               # ((None, 0), ["text\\n", ""])
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Literal

_CHUNK = 65536
_SEAL_ATTEMPTS = 200  # for two seconds
_KILL_SECONDS = 30

Stop = Literal["timeout", "output"]


class Running:
    """A process and its output; leaving the block kills it with all its children.

    process: in its own session, with pipes for stdout and stderr. output_bytes: limit on each. deadline: in `time.monotonic`.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, output_bytes: int, deadline: float):
        assert process.stdout is not None and process.stderr is not None
        self._process, self._limit, self._deadline = process, output_bytes, deadline
        self._init: int | None = None
        self._printed = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.kill()
        finally:
            if self._init is not None:
                os.close(self._init)
            with self._process:  # closes its pipes
                pass

    def find_init(self, info: int) -> None:
        """Find the first process of the sandbox, if there is one: when it dies, all the others die."""
        text = b""
        while _wait_for(info, self._deadline - time.monotonic()) and (chunk := os.read(info, _CHUNK)):
            text += chunk
        # Without a pid bwrap has failed, or is late: then it is killed, and the sandbox with it (--die-with-parent).
        if b"child-pid" in text:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                self._init = os.pidfd_open(json.loads(text)["child-pid"])

    def finish(self) -> tuple[Stop | None, int]:
        """Wait until the program ends or exceeds a limit, kill what it has left, and return the limit and the exit code.

        The code is that of a shell: 128 plus the signal's number if a signal ended the process.
        """
        stopped_by = self._read()
        self.kill()
        # Without waiting: a process that detached itself ("local") may keep the pipes open.
        for source in self._printed:
            os.set_blocking(source, False)
            with contextlib.suppress(BlockingIOError):
                while not self._exceeds_limit() and self._read_some(source):
                    pass
        code = self._process.returncode
        return "output" if self._exceeds_limit() else stopped_by, code if code >= 0 else 128 - code

    def _read(self) -> Stop | None:
        """Collect the output until the program ends (None) or exceeds a limit, which is returned."""
        ended = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for source in (ended, *self._printed):
                    selector.register(source, selectors.EVENT_READ)
                while (remaining := self._deadline - time.monotonic()) > 0:
                    ready = [key.fd for key, _ in selector.select(remaining)]
                    for source in ready:
                        if source != ended and not self._read_some(source):
                            selector.unregister(source)
                    if self._exceeds_limit():
                        return "output"
                    if ended in ready:
                        return None
        finally:
            os.close(ended)
        return "timeout"

    def kill(self) -> None:
        """Kill everything that still runs, and wait until it is gone; later calls do nothing."""
        if self._process.returncode is not None:
            return
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            # Readable only once all processes of its namespace are gone.
            if not _wait_for(self._init, _KILL_SECONDS):
                raise RuntimeError("the sandbox does not end although it was killed")
        # It has not been waited for, so its process group's id cannot have been reused. (bwrap may need a moment to notice that
        # the sandbox is gone and to return its exit code; it is killed only if the program was.)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_KILL_SECONDS)

    def texts(self) -> list[str]:
        """Output to stdout and to stderr, cut off at the limit, with U+FFFD for invalid UTF-8."""
        return [bytes(printed[: self._limit]).decode("utf-8", "replace") for printed in self._printed.values()]

    def _read_some(self, source: int) -> bool:
        chunk = os.read(source, _CHUNK)
        self._printed[source] += chunk
        return bool(chunk)

    def _exceeds_limit(self) -> bool:
        return any(len(printed) > self._limit for printed in self._printed.values())


@contextlib.contextmanager
def sealed(content: str | bytes) -> Iterator[int]:
    """The descriptor of an immutable file in memory: even a program that has it as its standard input cannot change it."""
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    file = os.memfd_create("text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(data)
        _seal(file)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


def _seal(file: int) -> None:
    """Make a file in memory immutable. The kernel answers "busy" while it still uses some of the file's pages."""
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    for attempt in range(_SEAL_ATTEMPTS):
        try:
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or attempt == _SEAL_ATTEMPTS - 1:
                raise
            time.sleep(0.01)


def _wait_for(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
