"""Errors that a user can fix get a message; unexpected ones keep their traceback."""

import errno
import os

import pytest
import torch

from rankup.grpo.common.errors import ClusterError, explain, is_transient
from rankup.grpo.common.world import WorkerLostError
from rankup.rewards.contract import RewardError
from rankup.rollout.types import EngineError


def cpu_out_of_memory() -> RuntimeError:
    """Torch's error for more memory than the machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    return caught.value


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (ValueError("lora.rank: too high"), ["lora.rank: too high"]),
        (FileNotFoundError("no file rows.jsonl"), ["no file rows.jsonl"]),
        (RewardError("reward function 'f' failed"), ["reward function 'f' failed"]),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs"), ["Permission denied", "runs"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ["no space left on the disk", "logging.output_dir"]),
        (EngineError("vLLM failed while sampling: bad"), ["vLLM failed while sampling: bad"]),
        (ClusterError("workers were lost"), ["workers were lost"]),
        (MemoryError(), ["out of memory", "optim.tokens_per_pack", "rankup plan"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["out of memory: CUDA out of memory", "gpu_memory_utilization"]),
        (cpu_out_of_memory(), ["out of memory", "optim.tokens_per_pack"]),
        (caused(EngineError("vLLM failed: no room"), MemoryError()), ["out of memory: vLLM failed: no room"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_that_a_user_can_fix_is_one_paragraph(error: Exception, parts: list[str]):
    text = explain(error)
    assert text is not None
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes differ"), AssertionError(), ZeroDivisionError()])
def test_an_unexpected_error_keeps_its_traceback(error: Exception):
    assert explain(error) is None


def test_errors_after_which_a_restart_may_help():
    for error in (ConnectionResetError(), TimeoutError(), WorkerLostError("gone"), EngineError("vLLM failed: illegal address")):
        assert is_transient(error)
    for error in (ValueError("bad"), FileNotFoundError("none"), caused(EngineError("no room"), MemoryError())):
        assert not is_transient(error)
