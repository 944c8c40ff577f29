"""What ends a worker, and which errors Ray answers by a restart; complete workers run in `test_cluster_runs.py`."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest

from rankup.grpo.checkpoint.remote import StorageError
from rankup.grpo.cluster.driver import _check_inputs
from rankup.grpo.cluster.ray_train import summarize
from rankup.grpo.cluster.worker import _is_final
from rankup.grpo.common.errors import BaseWeightsModifiedError, TrainingStoppedError
from rankup.grpo.common.world import WorkerLostError
from rankup.grpo.run.worker_reports import DivergedError
from rankup.grpo.user_inputs import UserInputs

HANGS = """
import sys, time
from rankup.grpo.cluster.worker import Deadline

def report():
    print("reported", flush=True)

deadline = Deadline(0.5, report)
deadline.extend()           # no effect before the start
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
    assert (result.returncode, result.stdout) == (1, "reported\n")
    assert "in hangs" in result.stderr


def test_nothing_is_due_after_the_stop():
    result = run("stop")
    assert (result.returncode, result.stdout) == (0, "")
    assert "Thread" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [ValueError("a mistake"), TrainingStoppedError("gave up"), FileNotFoundError("rows.jsonl"), DivergedError("two policies")],
)
def test_a_mistake_is_final(error: Exception):
    assert _is_final(error, has_begun=False) and _is_final(error, has_begun=True)


@pytest.mark.parametrize(
    "error",
    [
        WorkerLostError("gone"),
        ConnectionResetError(),
        RuntimeError("CUDA error"),
        KeyError("x"),
        BaseWeightsModifiedError("written"),
    ],
)
def test_other_errors_lead_to_a_restart(error: Exception):
    assert not _is_final(error, has_begun=False) and not _is_final(error, has_begun=True)


@pytest.mark.parametrize("error", [StorageError("no bucket"), OSError(errno.ESTALE, "stale file handle")])
def test_a_storage_that_could_be_reached_when_the_run_began_leads_to_a_restart(error: Exception):
    assert _is_final(error, has_begun=False) and not _is_final(error, has_begun=True)


def test_inputs_that_cannot_be_pickled_are_refused_before_any_worker_starts():
    lock = threading.Lock()
    _check_inputs(UserInputs(reward_funcs=len, train_dataset=[{"prompt": "a"}]))
    with pytest.raises(ValueError, match=r"sent to the workers, but these cannot be pickled .*lock.* reward\.py:score"):
        _check_inputs(UserInputs(reward_funcs=lambda completions: [lock.locked()]))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("Failed.\nThe actor is dead because its worker process has died. Exit type: X", "its worker process has died"),
        ("The actor died because its node has died. Node Id: 1", "its node has died"),
        ("Traceback (most recent call last):\n  File x\nWorkerLostError: gone\n", "WorkerLostError: gone"),
        ("", "RuntimeError"),
    ],
)
def test_a_failure_is_summarized_in_one_line(text: str, end: str):
    assert summarize(RuntimeError(text)) == end
