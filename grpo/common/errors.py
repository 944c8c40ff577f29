"""Errors that a user can do something about, in one paragraph each.

    try:
        trainer.train()
    except BaseException as error:
        if (text := explain(error)) is None:
            raise                           # a mistake of ours: the traceback is what helps
        print(text)

`Attempts` is for what has to be saved while an error is on its way out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from ...rewards.contract import RewardError
from ...rollout.types import EngineError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY = (
    "out of memory: {reason}. Take a smaller optim.tokens_per_pack or optim.logits_mib, set "
    "optim.gradient_checkpointing=true or optim.optimizer=adamw_8bit, or give vLLM less (rollout.kv_cache_gib on CPU, "
    "rollout.gpu_memory_utilization on a GPU); `rankup plan` says what fits"
)


class TrainingStoppedError(ValueError):
    """The guards gave up on the run. What it had learned is saved."""


class BaseWeightsModifiedError(RuntimeError):
    """Something wrote into the frozen base weights, which vLLM may share: neither sampler nor adapter can be trusted."""


class ClusterError(RuntimeError):
    """A run on a cluster has failed; the message is for the user.

    `can_resume`: whether it has left a checkpoint.
    """

    def __init__(self, message: str, *, can_resume: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume


class Attempts:
    """What is to be done while an error is on its way out: each is tried whatever becomes of the others, none replaces it."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def to(self, what: str, action: Callable[[], Any]) -> bool:
        """Try `action`; returns whether it succeeded."""
        try:
            action()
        except Exception as failure:  # whatever it is: the error that came first is the one to be told
            self.failures.append(f"could not {what}: {failure}")
            return False
        return True


def explain(error: BaseException) -> str | None:
    """What to tell the user; None where only a traceback can tell it."""
    if _is_out_of_memory(error):
        return OUT_OF_MEMORY.format(reason=first_line(error))
    if isinstance(error, EngineError):
        cause = error.__cause__
        memory = cause is not None and _is_out_of_memory(cause)
        return OUT_OF_MEMORY.format(reason=first_line(error)) if memory else str(error)
    if _is_full_disk(error):
        return f"no space left on the disk: {first_line(error)}. Free some, or give another logging.output_dir"
    if isinstance(error, ValueError | OSError | RewardError | ClusterError | BaseWeightsModifiedError):
        return str(error)
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same run may come through if it is started again: the network's errors, and the engine's but for memory."""
    if isinstance(error, EngineError):
        return error.__cause__ is None or not _is_out_of_memory(error.__cause__)
    return isinstance(error, ConnectionError | TimeoutError)


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's for CUDA, or torch's for the CPU: a RuntimeError like any other. Torch is not imported here."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def _is_full_disk(error: BaseException) -> bool:
    """The system's own error, or one that has the system's words only: that of safetensors, or of a checkpoint."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_SPACE
    return any(words in str(error) for number in NO_SPACE for words in (f"(os error {number})", f"[Errno {number}]"))


def first_line(error: BaseException) -> str:
    """What an error says, in one line without a full stop; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
