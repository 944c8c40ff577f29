"""Warnings of other libraries are held back, and printed if the block fails."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rankup.grpo.common.quiet import quiet_loggers, quiet_stderr


@contextmanager
def real_stderr() -> Iterator[None]:
    """Python's standard error on file descriptor 2, as outside of pytest; buffered, so that unflushed text is noticed."""
    with open(2, "w", closefd=False) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield


def remark() -> None:
    """Write to standard error by Python, by C code, and as a warning."""
    print("by python", file=sys.stderr)
    os.write(2, b"by C\n")
    warnings.warn("a warning", stacklevel=1)


def test_remarks_are_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    with real_stderr():
        with quiet_stderr():
            remark()
            print("result")
        print("afterwards", file=sys.stderr, flush=True)
        os.write(2, b"by C afterwards\n")
    assert capfd.readouterr() == ("result\n", "afterwards\nby C afterwards\n")


def test_a_replaced_stream_is_held_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live terminal view replaces `sys.stderr`, to print above itself."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with quiet_stderr():
        remark()
    assert shown.getvalue() == ""
    with pytest.raises(RuntimeError), quiet_stderr():
        remark()
        raise RuntimeError
    assert "by python" in shown.getvalue()


def test_earlier_output_is_not_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    with real_stderr():
        print("before", end="", file=sys.stderr)
        with quiet_stderr():
            pass
    assert capfd.readouterr().err == "before"


@pytest.mark.parametrize("failure", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_failure_shows_the_captured_output(capfd: pytest.CaptureFixture[str], failure: type[BaseException]) -> None:
    with real_stderr():
        with pytest.raises(failure), quiet_stderr():
            print("by python", file=sys.stderr)
            os.write(2, "because of this: é\n".encode())
            raise failure
        sys.stderr.flush()
        os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "because of this: é\nby python\nafterwards\n"


def test_no_file_descriptor_is_left_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with quiet_stderr():
            pass
    with pytest.raises(RuntimeError), quiet_stderr():
        raise RuntimeError
    assert set(os.listdir("/proc/self/fd")) == before


def test_warnings_are_shown_again_afterwards() -> None:
    before = list(warnings.filters)
    with quiet_stderr():
        pass
    assert list(warnings.filters) == before


def test_verbose_loggers_show_errors_only() -> None:
    names = ["transformers", "vllm", "peft"]
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        quiet_loggers()
        for name in names:
            assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
            assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
