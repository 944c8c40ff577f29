"""Signals: each test runs a small program and sends it real signals."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

HEAD = """
import sys, time, threading
from pathlib import Path
from rankup.grpo.common.interrupts import Interrupts, RunInterrupted
from rankup.grpo.common.log import log_to

said = []

def say(text):
    print("said", text, flush=True)
    said.append(text)  # in a thread of its own: a step that ends with it prints after it

def work(name, until=lambda: False):
    print(name, flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end and not until():
        time.sleep(0.01)

shown = log_to(say)  # kept: it ends when it is collected
shown.__enter__()
interrupts = Interrupts()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program; it is killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def run(body: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HEAD + body], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    """The lines that the program prints up to one that begins with `word`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(word):
            return lines
    raise AssertionError(f"the program ended without {word!r}: {lines}")


DEFERRED = """
with interrupts.handled(), interrupts.deferred():
    try:
        for step in range(3):
            interrupts.stop_if_requested()
            work(f"step {step}", until=lambda: interrupts.requested and said)
            print(f"finished {step}", flush=True)
    except RunInterrupted as interruption:
        print("stopped by", interruption.signal, interruption.code, flush=True)
        interruption.saved(Path("x"))
        raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_finish_and_the_status_is_0(start, number: signal.Signals):
    process = start(DEFERRED)
    lines_until(process, "step 0")
    process.send_signal(number)
    lines = lines_until(process, "stopped")
    again = "Ctrl-C again" if number is signal.SIGINT else "a second signal"
    assert lines[0] == f"said {number.name}: finishing this step, then saving; {again} quits now"
    assert lines[1:] == ["finished 0", f"stopped by {number.name} {128 + number}"]
    assert process.wait(timeout=10) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_immediately(start, number: signal.Signals):
    process = start(DEFERRED.replace("until=lambda: interrupts.requested and said", ""))
    lines_until(process, "step 0")
    process.send_signal(signal.SIGTERM)
    lines_until(process, "said")
    process.send_signal(number)
    assert process.wait(timeout=5) == -number


def test_a_signal_before_the_run_raises_immediately(start):
    process = start("with interrupts.handled():\n    work('start')\n")
    lines_until(process, "start")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_an_interruptible_block_is_left_immediately(start):
    process = start(
        """
with interrupts.handled(), interrupts.deferred():
    try:
        with interrupts.interruptible():
            work("evaluation")
    except RunInterrupted as interruption:
        print("stopped by", interruption.signal, flush=True)
"""
    )
    lines_until(process, "evaluation")
    process.send_signal(signal.SIGINT)
    assert lines_until(process, "stopped") == ["stopped by SIGINT"]


def test_an_interruptible_block_does_not_start_after_a_signal(start):
    process = start(
        """
with interrupts.handled(), interrupts.deferred():
    try:
        work("step", until=lambda: interrupts.requested and said)
        with interrupts.interruptible():
            print("evaluation", flush=True)
    except RunInterrupted:
        print("stopped", flush=True)
"""
    )
    lines_until(process, "step")
    process.send_signal(signal.SIGTERM)
    lines = lines_until(process, "stopped")
    assert [line for line in lines if not line.startswith("said")] == ["stopped"]


def test_an_ignored_signal_stays_ignored_and_handlers_are_restored(start):
    process = start(
        """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interrupts.handled(), interrupts.deferred():
    os.kill(os.getpid(), signal.SIGINT)
    interrupts.stop_if_requested()
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
print("end", flush=True)
"""
    )
    assert lines_until(process, "end") == ["True True", "end"]


def test_in_another_thread_signals_are_not_handled(start):
    process = start(
        """
def run():
    with interrupts.handled(), interrupts.deferred():
        interrupts.stop_if_requested()
        print("ran", flush=True)
thread = threading.Thread(target=run)
thread.start(); thread.join()
"""
    )
    lines_until(process, "ran")
    assert process.wait(timeout=10) == 0


def test_the_cursor_is_shown_again_on_a_terminal():
    body = "with interrupts.handled(), interrupts.deferred():\n    print('\\x1b[?25l', end='')\n    work('step')\n"
    terminal, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", HEAD + body], stdout=slave)
    os.close(slave)
    seen = b""

    def read_until(part: bytes) -> None:
        nonlocal seen
        while part not in seen:
            seen += os.read(terminal, 1024)

    try:
        read_until(b"step")
        process.send_signal(signal.SIGINT)
        read_until(b"said")
        process.send_signal(signal.SIGINT)
        read_until(b"\x1b[?25h")
        assert process.wait(timeout=5) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_a_process_forked_by_a_reward_function_ends_by_a_signal_as_usual(start):
    process = start(
        """
import multiprocessing
with interrupts.handled(), interrupts.deferred():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(timeout=10)
    print("ended", child.exitcode, interrupts.requested, flush=True)
    child.kill()
"""
    )
    assert lines_until(process, "ended") == ["ended -15 None"]


def test_a_closed_pipe_does_not_end_the_run():
    code = (
        "import sys, time; from rankup.grpo.display.choose import make_view\n"
        "view = make_view(max_steps=3, run_name='x')\n"
        "view.__enter__(); sys.stdin.read()\n"
        "view.note('one'); view.note('two'); print('three', flush=True)\n"
        "sys.exit(7)\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert (process.wait(timeout=30), process.stderr.read()) == (7, "")
