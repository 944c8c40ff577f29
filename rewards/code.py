"""Rewards that execute the program in a completion: against unit tests, or on inputs whose outputs are known.

    rewards:
      functions:
        - {function: "rankup.rewards.code:stdin_stdout", kwargs: {timeout: 2}}

The program is the last ```python block of the completion, else the last block that names no language, else the whole text. It
runs in the sandbox of `sandbox.py`, which needs bubblewrap (`apt install bubblewrap`).

`stdin_stdout` cannot be fooled: what is expected never enters the sandbox. `unit_tests` can, by whoever sets out to: see there.
"""

import functools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sandbox import Limits, Sandbox, choose_sandbox, run_python
from .texts import Completion, RewardFunction, text_of

_HARNESS = Path(__file__).with_name("code_harness.py")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"python", "python3", "py"}


def unit_tests(
    *,
    timeout: float = 5.0,
    memory_mib: int = 512,
    partial_credit: bool = False,
    site_packages: bool = False,
    workers: int | None = None,
    unsafe_local: bool = False,
) -> RewardFunction:
    """A reward for programs that pass tests: 1.0 where all pass, else 0.0.

    The row's column `tests` is a list of test codes (`assert f(2) == 4`), or one such string; None leaves the row out. A
    test sees the program's names, and passes when it runs to its end. Each runs in a fork of the process that loaded the
    program, so that no test sees what another one did. The program is loaded as a module, not as `__main__`; what it prints
    is dropped, and its standard input is empty.

    timeout: seconds for each test, and as many for starting Python and loading the program. memory_mib: MiB of each process.
    partial_credit: give the share of tests that pass. site_packages: let the program import the packages of this Python.
    workers: completions that run at once; None takes the number of cores. unsafe_local: where there is no bubblewrap, run the
    code without isolation from your files and the network.

    What counts is a random word that is read and printed when the test has ended, so neither exiting with success, nor
    printing, nor replaced builtins help a program. But it runs in one interpreter with its tests. A value whose `__eq__` always
    says yes passes for any other, and so may what it does to modules that a test imports (`math.isclose`). A program that goes
    through its own descriptors or the caller's frames finds the tests and the words. Where that matters, take `stdin_stdout`.

    Raises ValueError for values that cannot be, and where there is no sandbox; the reward function does for a row with no
    test.
    """
    return _UnitTests(
        limits=Limits(seconds=timeout, memory_mib=memory_mib),
        partial_credit=partial_credit,
        site_packages=site_packages,
        workers=_number_of_workers(workers),
        sandbox=choose_sandbox(unsafe_local=unsafe_local),
    )


def stdin_stdout(
    *,
    timeout: float = 5.0,
    memory_mib: int = 512,
    output_bytes: int = 64 * 1024,
    partial_credit: bool = False,
    site_packages: bool = False,
    workers: int | None = None,
    unsafe_local: bool = False,
) -> RewardFunction:
    """A reward for programs that print what is expected: 1.0 where all outputs are right, else 0.0.

    The row's columns `inputs` and `outputs` are lists of strings, of one length (or one string each); None in either leaves the
    row out. Each input is one run of the program as `__main__`. It must end with exit code 0, and its standard output must be
    the expected one but for white space at the end of lines and of the whole.

    timeout: seconds for each run, Python's start included. output_bytes: a program that prints more is stopped, and has failed.
    partial_credit: give the share of runs that are right. The other arguments are those of `unit_tests`.

    Raises ValueError for values that cannot be, and where there is no sandbox; the reward function does for a row without
    inputs, or with another number of outputs, or where an output is longer than output_bytes.
    """
    return _StdinStdout(
        limits=Limits(seconds=timeout, memory_mib=memory_mib, output_bytes=output_bytes),
        partial_credit=partial_credit,
        site_packages=site_packages,
        workers=_number_of_workers(workers),
        sandbox=choose_sandbox(unsafe_local=unsafe_local),
    )


@dataclass(frozen=True)
class _Executed:
    """What both rewards have in common."""

    limits: Limits
    partial_credit: bool
    site_packages: bool
    workers: int
    sandbox: Sandbox

    def _run(self, source: str, stdin: str, limits: Limits) -> tuple[bool, str]:
        outcome = run_python(source, stdin=stdin, limits=limits, site_packages=self.site_packages, sandbox=self.sandbox)
        return outcome.status == "ok", outcome.stdout

    def _concurrently(self, jobs: Sequence[Callable[[], float] | None]) -> list[float | None]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="code-rewards") as pool:
            futures = [None if job is None else pool.submit(job) for job in jobs]
            try:
                return [None if future is None else future.result() for future in futures]
            except BaseException:  # Ctrl-C too; it goes on
                pool.shutdown(wait=False, cancel_futures=True)  # those that run end with their limits
                raise


class _UnitTests(_Executed):
    __name__ = "unit_tests"

    def __call__(self, completions: Sequence[Completion], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
        jobs: list[Callable[[], float] | None] = []
        for row, (completion, wanted) in enumerate(zip(completions, tests, strict=True)):
            codes = None if wanted is None else _strings(row, "tests", wanted)
            jobs.append(None if codes is None else functools.partial(self._score, program_of(text_of(completion)), codes))
        return self._concurrently(jobs)

    def _score(self, program: str, tests: list[str]) -> float:
        marks = [secrets.token_hex(16) for _ in tests]
        limits = Limits(
            seconds=self.limits.seconds * (len(tests) + 1),
            memory_mib=self.limits.memory_mib,
            # A program that prints to the verdicts' descriptor must not be able to push verdicts out.
            output_bytes=64 * 1024 + 40 * len(tests),
        )
        stdin = _harness_input(program, tests, marks, seconds=self.limits.seconds, stop_at_failure=not self.partial_credit)
        _, printed = self._run(_HARNESS.read_text(), stdin, limits)
        passed = set(printed.split("\n"))
        share = sum(mark in passed for mark in marks) / len(marks)
        return share if self.partial_credit else float(share == 1.0)


class _StdinStdout(_Executed):
    __name__ = "stdin_stdout"

    def __call__(
        self, completions: Sequence[Completion], inputs: Sequence[Any], outputs: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        jobs: list[Callable[[], float] | None] = []
        for row, (completion, given, expected) in enumerate(zip(completions, inputs, outputs, strict=True)):
            pairs = None if given is None or expected is None else self._pairs(row, given, expected)
            jobs.append(None if pairs is None else functools.partial(self._score, program_of(text_of(completion)), pairs))
        return self._concurrently(jobs)

    def _pairs(self, row: int, given: Any, expected: Any) -> list[tuple[str, str]]:
        inputs, outputs = _strings(row, "inputs", given), _strings(row, "outputs", expected)
        if len(inputs) != len(outputs):
            raise ValueError(f"row {row} has {len(inputs)} inputs and {len(outputs)} outputs: give one output for each input")
        longest = max(len(output.encode()) for output in outputs)
        if longest > self.limits.output_bytes:
            raise ValueError(f"an output of row {row} has {longest} bytes: set output_bytes to more than that")
        return list(zip(inputs, outputs, strict=True))

    def _score(self, program: str, pairs: list[tuple[str, str]]) -> float:
        right = 0
        for given, expected in pairs:
            works, printed = self._run(program, given, self.limits)
            if works and _without_trailing_space(printed) == _without_trailing_space(expected):
                right += 1
            elif not self.partial_credit:
                return 0.0
        return right / len(pairs)


def program_of(text: str) -> str:
    """The program in a text: the last ```python block, else the last block that names no language, else all of it.

    A block that is never closed, as in a completion that was cut off, reaches to the end.
    """
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif not fence[1]:
            blocks.append((opening[1].lower(), text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening[1].lower(), text[opening.end() + 1 :]))
    for languages in (_PYTHON, {""}):
        programs = [block for language, block in blocks if language in languages]
        if programs:
            return programs[-1]
    return text


def _harness_input(program: str, tests: list[str], marks: list[str], *, seconds: float, stop_at_failure: bool) -> str:
    """The file that the harness reads. It begins with the header's length; then come the header and, by place and length in
    bytes, the parts."""
    parts = [_utf8(part) for part in [program, *(part for pair in zip(tests, marks, strict=True) for part in pair)]]
    width = 4096 + 64 * len(parts)  # of the header, blanks included: the places depend on where it ends
    places, start = [], 20 + width
    for part in parts:
        places.append((start, len(part)))
        start += len(part)
    pairs = list(zip(places[1::2], places[2::2], strict=True))
    header = {"program": places[0], "tests": pairs, "seconds": seconds, "stop_at_failure": stop_at_failure}
    text = f"{width:<20}{json.dumps(header):<{width}}"
    assert len(text) == 20 + width
    return text + b"".join(parts).decode("utf-8")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a completion may hold half a surrogate pair


def _strings(row: int, column: str, value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not strings or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"row {row}: {column} must be a string or a list of strings, at least one, not {value!r:.60}")
    return strings


def _without_trailing_space(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


def _number_of_workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    return workers
