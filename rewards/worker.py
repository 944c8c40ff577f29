"""A process that calls reward functions for `processes.py`.

    python -c "from rankup.rewards.worker import main; main(5)"     # 5: descriptor of the socket

Messages are pickles on a socket that the parent made. First a `Setup` comes in, and True goes out when all is loaded; then
pairs of a function's number and pickled `Inputs` come in, and a `Returned` or a `Failure` goes out for each. A function that
cannot be loaded answers its calls with a `Failure`; the others do not notice. The functions run on the main thread, so
verifiers that use `signal.alarm` work. When the parent ends, for whatever reason, so does this process.
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
    """What a reward process begins with. `path` is the parent's `sys.path`; `memory_bytes` of data, None: no bound."""

    functions: tuple[Portable, ...]
    path: tuple[str, ...]
    memory_bytes: int | None


def main(descriptor: int) -> None:
    """Serve until the parent closes its end."""
    _die_with_the_parent()
    # The parent answers both, and ends this process when it is done. Not SIG_IGN: that is handed down to what users start.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_answer_signals)
    os.set_inheritable(descriptor, False)  # a program that a function starts must not keep the socket open
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
    except Exception as error:  # a user's file may raise anything; its calls tell
        return failure_of(error)


def _reply(name: str, function: Function | Failure, inputs: bytes) -> bytes:
    if isinstance(function, Failure):
        return pickle.dumps(function)
    answer: Returned | Failure
    try:
        loaded: Inputs = pickle.loads(inputs)
        answer = call(name, function, loaded)
        return pickle.dumps(answer)  # within the try: what `log_extra` was given may be anything
    except Exception as error:  # a user's function may raise anything; it is reported
        return pickle.dumps(failure_of(error))


def _answer_signals() -> None:
    """What a function forks is ended by signals as ever: `multiprocessing` does so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die_with_the_parent() -> None:
    """A parent that is killed closes the socket, but a function that hangs would not see it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
