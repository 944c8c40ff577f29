"""Reward functions in a Ray cluster: every call is a task on some node of it.

    pool = RayPool([Portable(name="length", pickled=...)], num_workers=32, timeout=10.0, retries=1)
    future = pool.submit(0, inputs)           # at once; function 0
    future.result()                           # a Returned, or a Failure that says why there is none
    pool.close()

A task hands its call to a reward process (`processes.py`) beside the Ray worker that it runs in. Time limits, bounds on memory,
crashes and what functions print are that process's, on its node, as they are here: a function that hangs or crashes costs Ray
no worker. The process stays with the Ray worker, and with it the functions that it has loaded. `num_workers` tasks are under
way at once; further calls wait here, so a cluster that is shared never sees more of them.

Ray makes a task again whose worker or node it has lost, at most `LOST_WORKERS` times; what a function did wrong is no loss to
Ray, and `retries` here. Either way one thread waits for one object and hands it on: no call is lost, and none counted twice.

Where this process has no connection to Ray yet, the first pool makes one, to the cluster of Ray's own `RAY_ADDRESS` or to one
that it starts on this machine, and the last one to be closed ends it. Every node needs rankup and the packages that functions
import; functions from files of the user travel (`portable.py`).
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .contract import Failure
from .pool import Answer, Pool
from .portable import Portable
from .processes import Worker
from .ray_connection import CONNECTION
from .worker import Setup

LOST_WORKERS = 3
"""How often a call is made again whose Ray worker or node was lost. One that takes its node down must not take them all."""

MOST_WORKERS = 64
"""Tasks at once where nothing else is said: each costs this process a thread."""


class RayPool(Pool):
    """Calls of the same functions, `num_workers` at once. See the module's docstring.

    A task takes a CPU of the cluster; none where there is no free one when the pool starts, since trainers that hold them all
    would be waiting for calls that wait for them.

    Args:
        functions: what the tasks load; `submit` names them by their place.
        num_workers: tasks at once; None: as many as the cluster has CPUs, at most `MOST_WORKERS`.
        timeout: seconds that one call may take once it runs, None: for ever.
        retries: how often a call that failed is tried again.
        memory_bytes: bound on each reward process's data, None: no bound.

    Raises:
        ConnectionError: no cluster answers where `RAY_ADDRESS` says.
    """

    def __init__(
        self,
        functions: Sequence[Portable],
        *,
        num_workers: int | None = None,
        timeout: float | None = None,
        retries: int = 0,
        memory_bytes: int | None = None,
    ) -> None:
        self._has_connection = CONNECTION.hold()

        import ray

        num_cpus = 1 if ray.available_resources().get("CPU", 0) >= 1 else 0
        # SPREAD: trainers' nodes are not filled first, and calls do not go into a trainer's placement group.
        options = {"num_cpus": num_cpus, "max_retries": LOST_WORKERS, "scheduling_strategy": "SPREAD", "name": "reward"}
        task = ray.remote(_answer).options(**options)
        work = ray.put(pickle.dumps((tuple(functions), timeout, memory_bytes)))
        cluster_cpus = int(ray.cluster_resources().get("CPU", 1))
        num_lanes = num_workers or max(1, min(MOST_WORKERS, cluster_cpus))
        super().__init__(lambda: _Lane(task, work), num_lanes=num_lanes, retries=retries)

    def close(self) -> None:
        """Cancel all tasks and wait for their end; calls that have not been answered are cancelled."""
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
            if self._is_stopped or not ray.is_initialized():  # Ray would start a cluster for the task
                return Failure(reason="the connection to Ray was closed")
            self._running = self._task.remote(self._work, number, inputs)
        try:
            return ray.get(self._running)
        except RayError as error:
            return Failure(reason=f"Ray could not have it answered ({type(error).__name__})", details=str(error))
        finally:
            with self._lock:
                self._running = None

    def stop(self) -> None:
        import ray

        with self._lock:
            self._is_stopped = True
            if self._running is not None:
                ray.cancel(self._running)  # not by force: the task ends its process with the process's children

    def close(self) -> None:
        pass


# ------------------------------------------------------------------------------------------------------ in a Ray worker

_beside: tuple[bytes, Worker] | None = None
"""The reward process beside this Ray worker, and the work that it was started for."""


def _answer(work: bytes, number: int, inputs: bytes) -> Answer:
    """The task: one call, answered by the reward process beside this Ray worker."""
    global _beside
    if _beside is None or _beside[0] != work:
        if _beside is not None:
            _beside[1].close()
        functions, timeout, memory_bytes = pickle.loads(work)
        setup = Setup(functions=functions, path=tuple(sys.path), memory_bytes=memory_bytes)
        _beside = (work, Worker(setup, timeout=timeout))
    return _beside[1].answer(number, inputs)
