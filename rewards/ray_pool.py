"""Reward functions in a Ray cluster: every call is a task on one of its nodes.

    pool = RayPool([Portable(name="length", pickled=...)], RewardsConfig(num_workers=32, timeout=10, retries=1))
    future = pool.submit(0, pickle.dumps(inputs))     # returns immediately; calls function 0
    future.result()                                   # a Returned, or a Failure with the reason
    pool.close()

A task passes its call to a reward process (`processes.py`) next to the Ray worker that runs it. So time limits, memory limits,
crashes and printed output are handled on the node as in a local run, and a function that hangs or crashes costs no Ray worker.
The process, with the functions it has loaded, lives as long as the Ray worker. At most `num_workers` tasks exist at a time;
further calls wait here, so a shared cluster never sees more of them.

Ray repeats a task whose worker or node was lost, at most `LOST_WORKERS` times. A failure of the function is not a loss to Ray:
`retries` decides about that, here. In both cases one thread waits for one result, so no call is lost and none counts twice.

If this process has no connection to Ray yet, the first pool makes one, to the cluster in Ray's `RAY_ADDRESS` or to a new one on
this machine, and the last pool to be closed ends it. Every node needs rankup and the packages that the functions import;
functions from the user's files are sent with their code (`portable.py`).
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .config import RewardsConfig
from .contract import Failure
from .pool import Answer, Pool
from .portable import Portable
from .processes import Worker
from .ray_connection import CONNECTION
from .worker import Setup

LOST_WORKERS = 3
"""How often a call is repeated after its Ray worker or node was lost: one that kills its node must not kill them all."""

MAX_WORKERS = 64
"""Default limit on concurrent tasks: each takes a thread of this process."""


class RayPool(Pool):
    """Calls of the same functions, `config.num_workers` at a time. See the module's docstring.

    A task takes one CPU of the cluster; none if no CPU is free when the pool starts, since trainers that hold all CPUs would
    wait for calls that wait for a CPU.

    Args:
        functions: loaded by the tasks; `submit` takes an index into it.
        config: `num_workers` (None: the CPUs of the cluster, at most `MAX_WORKERS`), `timeout`, `retries` and `memory_gib`.

    Raises:
        ConnectionError: no cluster answers at `RAY_ADDRESS`.
    """

    def __init__(self, functions: Sequence[Portable], config: RewardsConfig) -> None:
        self._has_connection = CONNECTION.hold()

        import ray

        # SPREAD: does not fill the trainers' nodes first, and stays out of a trainer's placement group.
        task = ray.remote(_answer).options(
            num_cpus=1 if ray.available_resources().get("CPU", 0) >= 1 else 0,
            max_retries=LOST_WORKERS,
            scheduling_strategy="SPREAD",
            name="reward",
        )
        work = ray.put(pickle.dumps((tuple(functions), config.timeout, config.memory_bytes)))
        cluster_cpus = int(ray.cluster_resources().get("CPU", 1))
        num_lanes = config.num_workers or max(1, min(MAX_WORKERS, cluster_cpus))
        super().__init__(lambda: _Lane(task, work), num_lanes=num_lanes, retries=config.retries)

    def close(self) -> None:
        """Cancel all tasks and wait until they have ended; calls without an answer are cancelled."""
        super().close()
        if self._has_connection:
            self._has_connection = False
            CONNECTION.release()


class _Lane:
    """One task at a time."""

    def __init__(self, task: Any, work: Any) -> None:
        self._task, self._work = task, work
        self._lock = threading.Lock()
        self._running: Any = None
        self._is_stopped = False

    def answer(self, number: int, inputs: bytes) -> Answer:
        import ray
        from ray.exceptions import RayError

        with self._lock:
            if self._is_stopped or not ray.is_initialized():  # otherwise Ray would start a cluster for the task
                return Failure(reason="the connection to Ray was closed")
            self._running = self._task.remote(self._work, number, inputs)
        try:
            return ray.get(self._running)
        except RayError as error:
            return Failure(reason=f"Ray could not run it ({type(error).__name__})", details=str(error))
        finally:
            with self._lock:
                self._running = None

    def stop(self) -> None:
        import ray

        with self._lock:
            self._is_stopped = True
            if self._running is not None:
                ray.cancel(self._running)  # without force: the task then kills its process and that process's children

    def close(self) -> None:
        pass


# ------------------------------------------------------------------------------------------------------ in a Ray worker

_local: tuple[bytes, Worker] | None = None
"""The reward process of this Ray worker, and the pickled work that it was started for."""


def _answer(work: bytes, number: int, inputs: bytes) -> Answer:
    """The task: one call, answered by this Ray worker's reward process."""
    global _local
    if _local is None or _local[0] != work:
        if _local is not None:
            _local[1].close()
        functions, timeout, memory_bytes = pickle.loads(work)
        setup = Setup(functions=functions, path=tuple(sys.path), memory_bytes=memory_bytes)
        _local = (work, Worker(setup, timeout=timeout))
    return _local[1].answer(number, inputs)
