"""Reward functions in a Ray cluster: every call is a task on one of its nodes.

    pool = RayPool({"length": Portable(spec=b"...")}, RewardsConfig(num_workers=32, timeout=10, retries=1))
    future = pool.submit("length", pickle.dumps(inputs))     # returns immediately
    future.result()                                          # a Returned, or a Failure with the reason
    pool.close()

A task passes its call to a reward process (`processes.py`) next to the Ray worker that runs it, which lives as long as the
worker. So time limits, memory limits, crashes and printed output are handled on the node as in a local run, and a function that
hangs or crashes costs no Ray worker. At most `num_workers` tasks exist at a time; further calls wait here.

Ray repeats a task whose worker or node was lost, at most `LOST_WORKERS` times. A failure of the function is not a loss to Ray:
`retries` decides about that, here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
from collections.abc import Mapping

from .config import RewardsConfig
from .contract import Failure
from .pool import Answer, Pool
from .portable import Portable
from .processes import WorkerPool
from .ray_connection import CONNECTION

LOST_WORKERS = 3
"""How often a call is repeated after its Ray worker or node was lost: one that kills its node must not kill them all."""

MAX_WORKERS = 64
"""Default limit on concurrent tasks: a large cluster is shared."""

MAX_WAIT = 1.0
"""Seconds; a cancelled Ray task is interrupted between two waits."""


class RayPool(Pool):
    """Calls of the same functions, `config.num_workers` at a time. See the module's docstring.

    A task takes one CPU of the cluster; none if no CPU is free when the pool starts, since trainers that hold all CPUs would
    wait for calls that wait for a CPU.

    Args:
        functions: loaded by the tasks, by name.
        config: `num_workers` (None: the CPUs of the cluster, at most `MAX_WORKERS`), `timeout`, `retries` and `memory_gib`.

    Raises:
        ConnectionError: no cluster answers at `RAY_ADDRESS`.
    """

    def __init__(self, functions: Mapping[str, Portable], config: RewardsConfig) -> None:
        self._has_connection = CONNECTION.hold()

        import ray

        # SPREAD: does not fill the trainers' nodes first, and stays out of a trainer's placement group.
        self._task = ray.remote(_answer).options(
            num_cpus=1 if ray.available_resources().get("CPU", 0) >= 1 else 0,
            max_retries=LOST_WORKERS,
            scheduling_strategy="SPREAD",
            name="reward",
        )
        self._work = ray.put(pickle.dumps((dict(functions), config.model_copy(update={"num_workers": 1}))))
        cluster_cpus = int(ray.cluster_resources().get("CPU", 1))
        self._slots = asyncio.Semaphore(config.num_workers or max(1, min(MAX_WORKERS, cluster_cpus)))
        super().__init__(retries=config.retries)

    async def answer(self, name: str, inputs: bytes) -> Answer:
        import ray
        from ray.exceptions import RayError

        async with self._slots:
            if not ray.is_initialized():  # otherwise Ray would start a cluster for the task
                return Failure(reason="the connection to Ray was closed")
            reference = self._task.remote(self._work, name, inputs)
            result = asyncio.wrap_future(reference.future())
            try:
                await asyncio.wait({result})  # unlike `await result`, this does not cancel it
                return result.result()
            except RayError as error:
                return Failure(reason=f"Ray could not run it ({type(error).__name__})", details=str(error))
            except asyncio.CancelledError:
                ray.cancel(reference)  # without force: the task then kills its process and that process's children
                await asyncio.gather(result, return_exceptions=True)
                raise

    def close(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        super().close()
        if self._has_connection:
            CONNECTION.release()


# ------------------------------------------------------------------------------------------------------ in a Ray worker

_local: tuple[bytes, WorkerPool] | None = None
"""The pool, of one process, of this Ray worker, and the pickled work that it was started for."""


def _answer(work: bytes, name: str, inputs: bytes) -> Answer:
    """The task: one call, answered by this Ray worker's reward process."""
    global _local
    if _local is None or _local[0] != work:
        if _local is not None:
            _local[1].close()
        _local = (work, WorkerPool(*pickle.loads(work)))
    pool = _local[1]
    answer = pool.run(pool.answer(name, inputs))
    try:
        while not answer.done():
            concurrent.futures.wait([answer], MAX_WAIT)
        return answer.result()
    finally:
        answer.cancel()
