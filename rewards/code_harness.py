"""The program that a sandbox runs for `rankup.rewards.code.unit_tests`: the program, and then each test in a separate fork.

It is passed to the sandbox as text. Its standard input is a file: the header's place in 20 characters, the program, the tests
and their marks, and the header in JSON, which lists their places. A mark is a random word that is printed if a test has
passed; the reward counts these. It is not read before the test has ended, from a descriptor that is hard to come across.
"""

import builtins
import json
import select
import types

# Imported by name before the program runs, so that it cannot replace them by replacing `os.pread` or `sys.settrace`.
from os import O_RDWR, _exit, close, dup2, fork, fstat, kill, killpg, open, pidfd_open, pread, setsid, urandom, waitpid, write
from signal import ITIMER_REAL, SIGKILL, setitimer
from sys import modules, setprofile, settrace

Span = list[int]  # place and size of a part in bytes


def main() -> None:
    source, verdicts = hidden_descriptors()
    header = json.loads(pread(source, fstat(source).st_size, int(pread(source, 20, 0))))
    pristine, poll_class = dict(vars(builtins)), select.poll
    module = types.ModuleType("program")  # not __main__: code under `if __name__ == "__main__":` is not for tests
    modules["program"] = module
    setitimer(ITIMER_REAL, header["seconds"])  # SIGALRM kills the process
    exec(compile(part(source, header["program"]), "program.py", "exec", dont_inherit=True), module.__dict__)
    setitimer(ITIMER_REAL, 0)
    for test, mark in header["tests"]:
        child = fork()
        if child == 0:
            run_test(source, verdicts, test, mark, module.__dict__, pristine)
        poll = poll_class()
        ended = pidfd_open(child)
        poll.register(ended)
        poll.poll(header["seconds"] * 1000)
        close(ended)
        for send in (killpg, kill):  # the test's children; the test itself, in case it has no process group yet
            try:
                send(child, SIGKILL)
            except ProcessLookupError:
                pass
        if waitpid(child, 0)[1] != 0 and header["stop_at_failure"]:
            break


def hidden_descriptors() -> tuple[int, int]:
    """Move input and output to random descriptors, and open /dev/null in their place."""
    source = 16 + urandom(1)[0] % 16
    verdicts = source + 16
    dup2(0, source, inheritable=False)
    dup2(1, verdicts, inheritable=False)
    nothing = open("/dev/null", O_RDWR)
    for standard in (0, 1, 2):
        dup2(nothing, standard)
    close(nothing)
    return source, verdicts


def part(source: int, span: Span) -> bytes:
    start, length = span
    return pread(source, length, start)


def run_test(source: int, verdicts: int, test: Span, mark: Span, names: dict, pristine: dict) -> None:
    """Never returns. Exit code 0 only means that the next test should run: the program itself can exit with it too."""
    code = 1
    try:
        setsid()
        settrace(None)
        setprofile(None)
        builtins.__dict__.update(pristine)
        names["__builtins__"] = builtins
        exec(compile(part(source, test), "test.py", "exec", dont_inherit=True), names)
        write(verdicts, part(source, mark) + b"\n")
        code = 0
    finally:
        _exit(code)


if __name__ == "__main__":
    main()
