"""What a sandbox runs for `rankup.rewards.code.unit_tests`: the program, and then each test in a fork of its own.

It is passed to the sandbox as text. Its standard input is a file: the header's length in 20 characters, the header in JSON, and
then the program, the tests and their marks, at places that the header names. The mark is what the reward goes by: a random word
that is printed for a test that passed. It is not read before the test has ended, and lies where the program does not look.
"""

import builtins
import json
import select
import types

# By name and at once: a program that replaces `os.pread` or `sys.settrace` does not replace these.
from os import O_RDWR, _exit, close, dup2, fork, kill, killpg, open, pidfd_open, pread, setsid, urandom, waitpid, write
from signal import ITIMER_REAL, SIGKILL, setitimer
from sys import modules, setprofile, settrace

Place = list[int]  # where a part starts, and how many bytes it has


def main() -> None:
    source, verdicts = hidden_descriptors()
    header = json.loads(pread(source, int(pread(source, 20, 0)), 20))
    pristine, poll_class = dict(vars(builtins)), select.poll
    module = types.ModuleType("program")  # no __main__: what stands under `if __name__ == "__main__":` is not for tests
    modules["program"] = module
    setitimer(ITIMER_REAL, header["seconds"])  # SIGALRM ends the process
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
        for end in (killpg, kill):  # what the test has started, and the test itself, should it have got no group yet
            try:
                end(child, SIGKILL)
            except ProcessLookupError:
                pass
        if waitpid(child, 0)[1] != 0 and header["stop_at_failure"]:
            break


def hidden_descriptors() -> tuple[int, int]:
    """Put the input and the output where the program does not come across them, and nothing in their places."""
    source = 16 + urandom(1)[0] % 16
    verdicts = source + 16
    dup2(0, source, inheritable=False)
    dup2(1, verdicts, inheritable=False)
    nothing = open("/dev/null", O_RDWR)
    for standard in (0, 1, 2):
        dup2(nothing, standard)
    close(nothing)
    return source, verdicts


def part(source: int, place: Place) -> bytes:
    start, length = place
    return pread(source, length, start)


def run_test(source: int, verdicts: int, test: Place, mark: Place, names: dict, pristine: dict) -> None:
    """Never returns. Exit code 0 says no more than that it is worth going on: the program can exit like that too."""
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
