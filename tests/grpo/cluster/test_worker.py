"""What ends a worker, and which errors Ray answers by a restart; complete workers run in `test_cluster_runs.py`."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from typing import Any

import pytest

from rankup.grpo.checkpoint.remote import StorageError
from rankup.grpo.cluster.driver import _check_inputs
from rankup.grpo.cluster.final_errors import is_final
from rankup.grpo.cluster.ray_train import summarize
from rankup.grpo.common.errors import BaseWeightsModifiedError, TrainingStoppedError
from rankup.grpo.common.world import WorkerLostError
from rankup.grpo.config import GRPOConfig
from rankup.grpo.run.worker_reports import DivergedError
from rankup.grpo.user_inputs import UserInputs

pytestmark = pytest.mark.slow

HANGS = """
import sys, time
from rankup.grpo.cluster.deadline import Deadline

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


@pytest.fixture(scope="module")
def ended() -> dict[str, tuple[int, str, str]]:
    """Exit status, output and errors of a process that hangs, and of one that stops in time; they run at the same time."""
    command = [sys.executable, "-c", HANGS]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {ending: subprocess.Popen([*command, ending], **pipes) for ending in ("hang", "stop")}
    try:
        texts = {ending: process.communicate(timeout=50) for ending, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {ending: (process.returncode, *texts[ending]) for ending, process in processes.items()}


def test_a_process_that_hangs_ends_with_its_stacks(ended: dict[str, tuple[int, str, str]]):
    status, output, errors = ended["hang"]
    assert (status, output) == (1, "reported\n")
    assert "in hangs" in errors


def test_nothing_is_due_after_the_stop(ended: dict[str, tuple[int, str, str]]):
    status, output, errors = ended["stop"]
    assert (status, output) == (0, "")
    assert "Thread" not in errors


@pytest.mark.parametrize(
    "error",
    [ValueError("a mistake"), TrainingStoppedError("gave up"), FileNotFoundError("rows.jsonl"), DivergedError("two policies")],
)
def test_a_mistake_is_final(error: Exception):
    assert is_final(error, has_begun=False) and is_final(error, has_begun=True)


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
    assert not is_final(error, has_begun=False) and not is_final(error, has_begun=True)


@pytest.mark.parametrize("error", [StorageError("no bucket"), OSError(errno.ESTALE, "stale file handle")])
def test_a_storage_that_could_be_reached_when_the_run_began_leads_to_a_restart(error: Exception):
    assert is_final(error, has_begun=False) and not is_final(error, has_begun=True)


def test_inputs_that_cannot_be_pickled_are_refused_before_any_worker_starts():
    lock = threading.Lock()
    _check_inputs(GRPOConfig(), UserInputs(reward_funcs=len, train_dataset=[{"prompt": "a"}]))
    with pytest.raises(ValueError, match=r"sent to the workers, but these cannot be pickled .*lock.* reward\.py:score"):
        _check_inputs(GRPOConfig(), UserInputs(reward_funcs=lambda completions: [lock.locked()]))


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
