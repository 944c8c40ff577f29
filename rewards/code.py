"""Rewards that execute the program in a completion: against unit tests, or on inputs whose outputs are known.

    rewards:
      functions:
        - {function: "rankup.rewards.code:stdin_stdout", kwargs: {timeout: 2}}

The program is the last ```python block of the completion, else the last block without a language, else the complete text. It
runs in the sandbox of `sandbox.py`, which needs bubblewrap (`apt install bubblewrap`).

`stdin_stdout` cannot be forged: the expected output never enters the sandbox. `unit_tests` can, by a program that tries to: see
its docstring.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .contract import with_check
from .sandbox import Limits, choose_sandbox, run_python
from .texts import Completion, Function, text_of

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
) -> Function:
    """A reward for programs that pass tests: 1.0 if all pass, else 0.0.

    The row's column `tests` is a list of test codes (`assert f(2) == 4`), or one such string; a row with None gets None. A
    test sees the program's names, and passes if it runs to its end. Each runs in a fork of the process that loaded the program,
    so no test sees the effects of another. The program is loaded as a module, not as `__main__`; its output is discarded, and
    its standard input is empty.

    timeout: seconds for each test, and again for starting Python and loading the program. memory_mib: MiB for each process.
    partial_credit: give the share of tests that pass. site_packages: let the program import the packages of this Python.
    workers: completions that run concurrently; None: one per core. unsafe_local: if there is no bubblewrap, run the code
    without isolation from your files and the network.

    A test counts as passed if a random word was printed, which is read only once the test has ended. So exiting with success,
    printing, or replacing builtins does not help a program. But it shares one interpreter with its tests: a value whose
    `__eq__` always returns True equals any other, changes to modules that a test imports may work too (`math.isclose`), and a
    program that searches its descriptors or the caller's frames finds the tests and the words. Use `stdin_stdout` if that
    matters.

    Raises ValueError for invalid values, and if there is no sandbox; the reward function does for a row without tests.
    """
    run = functools.partial(run_python, site_packages=site_packages, sandbox=choose_sandbox(unsafe_local=unsafe_local))
    limits = Limits(seconds=timeout, memory_mib=memory_mib)
    workers = _number_of_workers(workers)

    def score(program: str, tests: list[str]) -> float:
        marks = [secrets.token_hex(16) for _ in tests]
        stdin = _harness_input(program, tests, marks, seconds=timeout, stop_at_failure=not partial_credit)
        seconds = timeout * (len(tests) + 1)
        output_bytes = 64 * 1024 + 40 * len(tests)  # room for all verdicts, even if the program prints to their descriptor
        harness_limits = dataclasses.replace(limits, seconds=seconds, output_bytes=output_bytes)
        passed = set(run(_HARNESS.read_text(), stdin=stdin, limits=harness_limits).stdout.split("\n"))
        share = sum(mark in passed for mark in marks) / len(marks)
        return share if partial_credit else float(share == 1.0)

    def check_tests(tests: Any, **columns: Any) -> None:
        if tests is not None:
            _strings("", "tests", tests)

    @with_check(check_tests)
    def reward(completions: Sequence[Completion], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
        cases = [None if codes is None else _strings(f"row {row}: ", "tests", codes) for row, codes in enumerate(tests)]
        return _concurrently(score, completions, cases, workers)

    reward.__name__ = "unit_tests"
    return reward


def stdin_stdout(
    *,
    timeout: float = 5.0,
    memory_mib: int = 512,
    output_bytes: int = 64 * 1024,
    partial_credit: bool = False,
    site_packages: bool = False,
    workers: int | None = None,
    unsafe_local: bool = False,
) -> Function:
    """A reward for programs that print the expected output: 1.0 if all outputs are correct, else 0.0.

    The row's columns `inputs` and `outputs` are lists of strings of equal length (or one string each); a row with None in
    either gets None. The program runs once per input as `__main__`. It must exit with code 0, and its standard output must be
    the expected one, ignoring white space at the end of lines and of the text.

    timeout: seconds for each run, including Python's start. output_bytes: a program that prints more is killed, and fails.
    partial_credit: give the share of correct runs. The other arguments are those of `unit_tests`.

    Raises ValueError for invalid values, and if there is no sandbox; the reward function does for a row without inputs, with
    another number of outputs, or with an output longer than output_bytes.
    """
    run = functools.partial(run_python, site_packages=site_packages, sandbox=choose_sandbox(unsafe_local=unsafe_local))
    limits = Limits(seconds=timeout, memory_mib=memory_mib, output_bytes=output_bytes)
    workers = _number_of_workers(workers)

    def score(program: str, pairs: list[tuple[str, str]]) -> float:
        num_correct = 0
        for stdin, expected in pairs:
            outcome = run(program, stdin=stdin, limits=limits)
            if outcome.status == "ok" and _without_trailing_space(outcome.stdout) == _without_trailing_space(expected):
                num_correct += 1
            elif not partial_credit:
                return 0.0
        return num_correct / len(pairs)

    def check_pairs(inputs: Any, outputs: Any, **columns: Any) -> None:
        if inputs is not None and outputs is not None:
            _pairs("", inputs, outputs, output_bytes=output_bytes)

    @with_check(check_pairs)
    def reward(
        completions: Sequence[Completion], inputs: Sequence[Any], outputs: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        rows = enumerate(zip(inputs, outputs, strict=True))
        cases = [
            None if stdin is None or expected is None else _pairs(f"row {row}: ", stdin, expected, output_bytes=output_bytes)
            for row, (stdin, expected) in rows
        ]
        return _concurrently(score, completions, cases, workers)

    reward.__name__ = "stdin_stdout"
    return reward


def _concurrently(
    score: Callable[[str, Any], float], completions: Sequence[Completion], cases: Sequence[Any], workers: int
) -> list[float | None]:
    """The score of each completion's program in the row's test cases; None for rows without any."""
    with ThreadPoolExecutor(workers, thread_name_prefix="code-rewards") as pool:
        futures = [
            None if case is None else pool.submit(score, program_of(text_of(completion)), case)
            for completion, case in zip(completions, cases, strict=True)
        ]
        try:
            return [None if future is None else future.result() for future in futures]
        except BaseException:  # Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)  # running ones end by their time limit
            raise


def _pairs(where: str, stdin: Any, expected: Any, *, output_bytes: int) -> list[tuple[str, str]]:
    inputs, outputs = _strings(where, "inputs", stdin), _strings(where, "outputs", expected)
    if len(inputs) != len(outputs):
        raise ValueError(f"{where}there are {len(inputs)} inputs and {len(outputs)} outputs: give one output for each input")
    longest = max(len(output.encode("utf-8", "replace")) for output in outputs)
    if longest > output_bytes:
        raise ValueError(f"{where}an output has {longest} bytes: set output_bytes to more than that")
    return list(zip(inputs, outputs, strict=True))


def program_of(text: str) -> str:
    """The program in a text: the last ```python block, else the last block without a language, else the complete text.

    A block that is never closed, as in a completion that was cut off, extends to the end.
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
    """The file that the harness reads: the place of the header, the parts, and the header with each part's place and size."""
    texts = [program, *(text for pair in zip(tests, marks, strict=True) for text in pair)]
    parts = [text.encode("utf-8", "replace") for text in texts]  # a completion may contain half a surrogate pair
    *starts, end = itertools.accumulate(map(len, parts), initial=20)
    spans = [(start, len(part)) for start, part in zip(starts, parts, strict=True)]
    pairs = list(zip(spans[1::2], spans[2::2], strict=True))
    header = {"program": spans[0], "tests": pairs, "seconds": seconds, "stop_at_failure": stop_at_failure}
    return f"{end:<20}{b''.join(parts).decode()}{json.dumps(header)}"


def _strings(where: str, column: str, value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not strings or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"{where}{column} must be a string or a non-empty list of strings, not {value!r:.60}")
    return strings


def _without_trailing_space(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


def _number_of_workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    return workers
