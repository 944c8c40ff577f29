"""What ends a worker, and what Ray may answer by starting again; whole workers run in `test_cluster.py`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rankup.grpo.cluster_worker import _is_final
from rankup.grpo.errors import TrainingStoppedError
from rankup.grpo.peers import LostPeerError
from rankup.grpo.worker_reports import DivergedError

HANGS = """
import sys, time
from rankup.grpo.cluster_worker import Deadline

def tells():
    print("told", flush=True)

deadline = Deadline(0.5, tells)
deadline.extend()           # before the start it is nothing
time.sleep(1)
deadline.start()
for _ in range(8):
    time.sleep(0.2)
    deadline.extend()
if sys.argv[1] == "stop":
    deadline.stop()
    time.sleep(3.5)
    sys.exit(0)

def hangs():
    time.sleep(60)

hangs()
"""


def run(ending: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HANGS, ending], capture_output=True, text=True, timeout=50)


def test_a_process_that_hangs_ends_with_its_stacks():
    result = run("hang")
    assert (result.returncode, result.stdout) == (1, "told\n")
    assert "in hangs" in result.stderr


def test_nothing_is_due_after_the_stop():
    result = run("stop")
    assert (result.returncode, result.stdout) == (0, "")
    assert "Thread" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [ValueError("a mistake"), TrainingStoppedError("gave up"), FileNotFoundError("rows.jsonl"), DivergedError("two policies")],
)
def test_what_would_come_again_is_not_tried_again(error: Exception):
    assert _is_final(error)


@pytest.mark.parametrize("error", [LostPeerError("gone"), ConnectionResetError(), RuntimeError("CUDA error"), KeyError("x")])
def test_all_else_is(error: Exception):
    assert not _is_final(error)
