"""Error messages for users: one paragraph with the error and the remedy.

    try:
        trainer.train()
    except BaseException as error:
        if (text := explain(error)) is None:
            raise                           # a bug in rankup: the traceback helps more
        print(text)

`Attempts` runs clean-up actions while an exception propagates.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from typing import Any

from ...rewards.contract import RewardError
from ...rollout.types import EngineError

HOLDERS_OF_MODELS = (__name__.partition(".")[0], "torch", "transformers", "peft", "vllm", "triton")
"""Packages whose functions have a model, or its activations, in local variables."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY = (
    "out of memory: {reason}. Lower optim.tokens_per_pack or optim.logits_mib, set optim.gradient_checkpointing=true or "
    "optim.optimizer=adamw_8bit, or give vLLM less memory (rollout.kv_cache_gib on CPU, rollout.gpu_memory_utilization on a "
    "GPU); `rankup plan` shows what fits"
)


OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
)


class TrainingStoppedError(ValueError):
    """The guards stopped the run, or most episodes or all rewards failed. All workers raise it after the same step; what was
    learned so far is saved."""


class BaseWeightsModifiedError(RuntimeError):
    """Something wrote into the frozen base weights, which vLLM may share: neither sampler nor adapter can be trusted."""


class ClusterError(RuntimeError):
    """A run on a cluster failed; the message is for the user.

    `can_resume`: whether the run saved a checkpoint.
    """

    def __init__(self, message: str, *, can_resume: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume


class Attempts:
    """Runs clean-up actions while an exception propagates: each runs even if others fail, and none replaces the exception.

    `failures` has one line for each action that failed.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []

    def to(self, what: str, action: Callable[[], Any]) -> bool:
        """Run `action`, described as in "could not <what>"; returns whether it succeeded."""
        try:
            action()
        except Exception as failure:  # of any type: the first exception is the one to report
            self.failures.append(f"could not {what}: {failure}")
            return False
        return True


def explain(error: BaseException) -> str | None:
    """The message for the user; None for an unexpected error, whose traceback should be shown."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY.format(reason=first_line(error))
    if isinstance(error, EngineError):
        cause = error.__cause__
        memory = cause is not None and is_out_of_memory(cause)
        return OUT_OF_MEMORY.format(reason=first_line(error)) if memory else str(error)
    if _is_full_disk(error):
        return f"no space left on the disk: {first_line(error)}. Free some space, or set another logging.output_dir"
    if isinstance(error, ValueError | OSError | RewardError | ClusterError | BaseWeightsModifiedError):
        return str(error)
    return None


def is_transient(error: BaseException) -> bool:
    """Whether restarting the run may help: for network errors, and for engine errors other than out of memory."""
    if isinstance(error, EngineError):
        return error.__cause__ is None or not is_out_of_memory(error.__cause__)
    return isinstance(error, ConnectionError | TimeoutError)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's error, torch's for CUDA, or a plain RuntimeError: torch's for the CPU, cuBLAS's, and those of CUDA itself and of
    Triton. Does not import torch."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def _is_full_disk(error: BaseException) -> bool:
    """An OSError, or an error of safetensors or of a checkpoint that only contains the text of one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_SPACE
    return any(words in str(error) for number in NO_SPACE for words in (f"(os error {number})", f"[Errno {number}]"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message without a full stop; the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def forget_models(error: BaseException) -> None:
    """Clear the local variables of finished functions in the error's tracebacks, except those of the user's code.

    A notebook keeps the last traceback, and with it a model in memory, until the next error.
    """
    seen: list[BaseException] = []
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        chain += [one.__cause__, one.__context__]
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if frame.f_globals.get("__name__", "").partition(".")[0] in HOLDERS_OF_MODELS:
                try:
                    frame.clear()
                except RuntimeError:  # it is still running
                    continue
