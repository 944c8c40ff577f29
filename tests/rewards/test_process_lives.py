"""Reward processes die, hang, print and keep descriptors open in every way, and the caller always gets an answer."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from scored import UnreadableError, inputs, length, obeys

from rankup.rewards.contract import RewardError

pytestmark = pytest.mark.slow


def test_output_of_functions_is_printed_here(make_scorer, capfd):
    def prints(completions, **kwargs):
        print("from a reward function")
        os.write(2, b"and without a line's end")
        return [0.0]

    scorer = make_scorer(prints)
    scorer.score(inputs("a"))
    scorer.close()
    assert capfd.readouterr().out.splitlines() == ["from a reward function", "and without a line's end"]


@pytest.mark.parametrize(("fault", "how"), [("exit 3", "exit status 3"), ("kill it", "killed by signal 9")])
def test_a_process_that_dies_costs_its_call_and_is_replaced(make_scorer, fault, how):
    scorer = make_scorer(obeys, num_workers=1)
    with pytest.raises(RewardError, match=rf"died \({how}\)"):
        scorer.score(inputs(fault))
    assert scorer.score(inputs("fine")).total == [1.0]


def test_the_last_output_of_a_process_that_died_is_reported(make_scorer):
    with pytest.raises(RewardError, match="on its way out"):
        make_scorer(obeys).score(inputs("exit 1"))


def test_a_process_is_killed_with_its_children(make_scorer, tmp_path):
    def has_a_child(completions, path, **kwargs):
        child = subprocess.Popen(["sleep", "600"])
        with open(path[0], "w") as file:
            file.write(str(child.pid))
        time.sleep(600)

    pid_file = tmp_path / "pid"
    make_scorer(has_a_child, timeout=2.0, on_error="none").score(inputs("a", path=[str(pid_file)]))
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_complete_job_are_handled_by_the_parent(make_scorer, number):
    """Schedulers send them to every process; the current step must still be scored. Programs of the user still end on them."""

    def has_variable(completions, number, **kwargs):
        with subprocess.Popen(["sleep", "600"]) as child:
            child.terminate()
        os.kill(os.getpid(), number[0])
        time.sleep(0.2)
        return [float(child.returncode == -signal.SIGTERM)]

    assert make_scorer(has_variable, num_workers=1).score(inputs("a", number=[int(number)])).total == [1.0]


def test_processes_that_a_function_forks_end_on_signals_as_usual(make_scorer):
    """`multiprocessing` ends its processes by SIGTERM, which they must not have learned to ignore."""

    def forks(completions, **kwargs):
        import multiprocessing

        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.2)
        child.terminate()
        child.join(timeout=10)
        return [float(child.exitcode == -signal.SIGTERM)]

    assert make_scorer(forks, num_workers=1).score(inputs("a")).total == [1.0]


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("chunk", [b"x\n" * 32768, b"x" * 65536])
def test_endless_printing_does_not_delay_the_time_limit(make_scorer, capfd, chunk):
    def prints(completions, **kwargs):
        while True:
            os.write(1, chunk)

    started = time.monotonic()
    scores = make_scorer(prints, timeout=2.0, on_error="none").score(inputs("a"))
    assert "no answer in 2 s" in str(scores.errors)
    assert time.monotonic() - started < 60
    capfd.readouterr()


def test_the_death_of_a_process_is_detected_while_a_child_holds_its_descriptors(make_scorer):
    def leaves_a_child(completions, **kwargs):
        if os.fork() == 0:
            os.setsid()
            time.sleep(30)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    scorer = make_scorer(leaves_a_child, timeout=None, on_error="none", num_workers=1)
    started = time.monotonic()
    assert "killed by signal 9" in str(scorer.score(inputs("a")).errors)
    scorer.close()
    assert time.monotonic() - started < 25


def test_a_process_that_closes_its_socket_and_lives_is_killed(make_scorer):
    def closes_all(completions, **kwargs):
        os.closerange(3, 256)
        time.sleep(600)

    scores = make_scorer(closes_all, timeout=None, on_error="none").score(inputs("a"))
    assert "closed its socket" in str(scores.errors)


def test_objects_that_a_function_logs_arrive_as_text(make_scorer):
    def logs(completions, log_extra, **kwargs):
        log_extra("what", [UnreadableError(1, 2)])
        return [1.0]

    scores = make_scorer([logs, length], on_error="none", num_workers=1).score(inputs("a"))
    assert scores.by_function == {"logs": [1.0], "length": [1.0]}
    assert scores.extras == {"what": ["text"]}


def test_output_that_cannot_be_shown_does_not_fail_a_call(make_scorer, monkeypatch):
    def prints(completions, **kwargs):
        print("größer")
        return [1.0]

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    scorer = make_scorer(prints, num_workers=1)
    assert scorer.score(inputs("a")).total == [1.0]
    assert ascii_only.buffer.getvalue() == b"gr??er\n"
    ascii_only.close()
    assert scorer.score(inputs("a")).total == [1.0], "no reader is left"


def test_closing_completes_every_future(make_scorer):
    scorer = make_scorer(length, on_error="none")
    pending = [scorer.submit(inputs("a")) for _ in range(60)]
    scorer.close()
    assert all(one.is_finished() for one in pending)


def test_memory_is_bounded(make_scorer):
    scorer = make_scorer(obeys, memory_gib=0.5, on_error="none")
    assert scorer.score(inputs("allocate 50")).total == [1.0]
    scores = scorer.score(inputs("allocate 2000"))
    assert scores.total == [None] and "MemoryError" in str(scores.errors)


def test_processes_end_with_the_parent(tmp_path):
    """Killed outright, the parent can close nothing; a function that hangs does not look at its socket."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from rankup.rewards import RewardsConfig, Scorer\n"
        "from rankup.rewards.contract import Inputs\n"
        "def hangs(completions, **kwargs):\n"
        "    print('pid', os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "scorer = Scorer(RewardsConfig(isolation='process', num_workers=1), hangs)\n"
        "scorer.submit(Inputs(prompts=['p'], completions=['c'], completion_ids=[[1]]))\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline().split()[1])
    assert _runs(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_closing_leaves_no_process_and_no_descriptor(make_scorer):
    make_scorer(length).score(inputs("a"))
    before = len(os.listdir("/proc/self/fd"))
    scorer = make_scorer(length, num_workers=3)
    scorer.submit(inputs("a"))
    scorer.close()
    assert len(os.listdir("/proc/self/fd")) == before
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert children.count("rankup.rewards.worker") == 2, "those of the first scorer"
