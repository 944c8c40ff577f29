"""A process that calls reward functions for `processes.py`.

    python -c "from rankup.rewards.worker import main; main(5)"     # 5: descriptor of the socket

The parent made the socket; each message on it begins with its size. First comes the setup: the functions by name, the parent's
`sys.path`, and the limit on data in GiB or None. This process answers once everything is loaded. Then it receives pairs of a
function's name and pickled `Inputs`, and answers each with a `Returned` or a `Failure`. Calls of a function that could not be
loaded get a `Failure`; the other functions are not affected. The functions run on the main thread, so verifiers that use
`signal.alarm` work. When the parent dies, however it dies, so does this process.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import sys
from io import BufferedRWPair

from .contract import Failure, Function, call, failure_of
from .portable import Portable

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
SIZE_BYTES = 8


def main(descriptor: int) -> None:
    """Serve until the parent closes its end."""
    # A killed parent closes the socket, but a function that hangs would not notice.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent handles both signals, and ends this process when it is done. Not SIG_IGN: child programs would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_restore_signals)
    os.set_inheritable(descriptor, False)  # programs started by a function must not keep the socket open
    stream = socket.socket(fileno=descriptor).makefile("rwb")
    portables, sys.path[:], memory_gib = pickle.loads(_receive(stream))
    if memory_gib is not None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    functions = {name: _load(portable) for name, portable in portables.items()}
    _send(stream, b"loaded")
    while message := _receive(stream):
        name, inputs = pickle.loads(message)
        _send(stream, _reply(name, functions[name], inputs))


def _receive(stream: BufferedRWPair) -> bytes:
    """The next message; empty if the parent has closed its end."""
    return stream.read(int.from_bytes(stream.read(SIZE_BYTES), "big"))


def _send(stream: BufferedRWPair, message: bytes) -> None:
    stream.write(len(message).to_bytes(SIZE_BYTES, "big") + message)
    stream.flush()


def _load(portable: Portable) -> Function | Failure:
    try:
        return portable.load()
    except BaseException as error:  # a user's file may raise anything; each call reports it
        return failure_of(error)


def _reply(name: str, function: Function | Failure, inputs: bytes) -> bytes:
    if isinstance(function, Failure):
        return pickle.dumps(function)
    process, num_rows = os.getpid(), 0
    try:
        call_inputs = pickle.loads(inputs)
        num_rows = len(call_inputs)
        return pickle.dumps(call(name, function, call_inputs))
    except BaseException as error:  # a user's function may raise anything, and call sys.exit()
        if os.getpid() != process:  # a fork of the function's must end, and not answer for its parent
            raise
        return pickle.dumps(failure_of(error, num_rows=num_rows))


def _restore_signals() -> None:
    """Processes that a function forks end on signals as usual: `multiprocessing` relies on that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
