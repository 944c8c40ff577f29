"""A process that calls reward functions for `processes.py`.

    python -c "from rankup.rewards.worker import main; main(5)"     # 5: descriptor of the socket

Messages are pickles on a socket that the parent made. First this process receives a `Setup` and sends True once everything is
loaded; then it receives pairs of a function's index and pickled `Inputs`, and sends a `Returned` or a `Failure` for each. Calls
of a function that could not be loaded get a `Failure`; the other functions are not affected. The functions run on the main
thread, so verifiers that use `signal.alarm` work. When the parent dies, however it dies, so does this process.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection

from .contract import Failure, Function, Inputs, Returned, call, failure_of
from .portable import Portable

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Loaded first by a reward process. `path`: the parent's `sys.path`; `memory_bytes`: limit on data, None: no limit."""

    functions: tuple[Portable, ...]
    path: tuple[str, ...]
    memory_bytes: int | None


def main(descriptor: int) -> None:
    """Serve until the parent closes its end."""
    _die_with_parent()
    # The parent handles both signals, and ends this process when it is done. Not SIG_IGN: child programs would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_restore_signals)
    os.set_inheritable(descriptor, False)  # programs started by a function must not keep the socket open
    connection = Connection(descriptor)
    setup: Setup = pickle.loads(connection.recv_bytes())
    sys.path[:] = setup.path
    if setup.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
    functions = [_load(function) for function in setup.functions]
    connection.send_bytes(pickle.dumps(True))
    names = [function.name for function in setup.functions]
    while True:
        try:
            number = int.from_bytes(connection.recv_bytes(), "big")
            inputs = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_reply(names[number], functions[number], inputs))


def _load(portable: Portable) -> Function | Failure:
    try:
        return portable.load()
    except Exception as error:  # a user's file may raise anything; each call reports it
        return failure_of(error)


def _reply(name: str, function: Function | Failure, inputs: bytes) -> bytes:
    if isinstance(function, Failure):
        return pickle.dumps(function)
    answer: Returned | Failure
    try:
        loaded: Inputs = pickle.loads(inputs)
        answer = call(name, function, loaded)
        return pickle.dumps(answer)  # inside the try: `log_extra` accepts any object
    except Exception as error:  # a user's function may raise anything
        return pickle.dumps(failure_of(error))


def _restore_signals() -> None:
    """Processes that a function forks end on signals as usual: `multiprocessing` relies on that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die_with_parent() -> None:
    """A killed parent closes the socket, but a function that hangs would not notice."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
