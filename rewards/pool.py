"""Calls that run concurrently on an event loop of their own: async functions, and what all pools have in common.

    class AlwaysOne(Pool):
        async def answer(self, name, inputs):
            return pickle.dumps(Returned(rewards=[1.0]))

    pool = AlwaysOne(retries=1)
    future = pool.submit("length", pickle.dumps(inputs))     # returns immediately
    future.result().rewards                                  # [1.0]; a Failure has a `reason` instead
    pool.close()

A pool passes each call to a process (`processes.py`), or to a task in a Ray cluster (`ray_pool.py`). All that it does runs on
its loop, so there is nothing to lock, and each call has one result, however often it is tried.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from .contract import CallResult, Failure

Answer = bytes | Failure
"""A pickled `CallResult`, or why there is none."""


class BackgroundLoop:
    """An event loop on a daemon thread, so that the caller's thread may run another one (a notebook)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel everything that runs, and end the thread."""
        self.run(self._finish()).result()
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        while not self._is_closed:
            # A task that a user's function started and that calls sys.exit() ends the loop too. Its error is in the task.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    async def _finish(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Pool(BackgroundLoop):
    """Subclasses define `answer`. `retries`: how often a failed call is repeated."""

    def __init__(self, *, retries: int) -> None:
        super().__init__()
        self._retries = retries

    async def answer(self, name: str, inputs: bytes) -> Answer:
        """Call the function with this name and pickled `Inputs`, once. Never raises what the function raises."""
        raise NotImplementedError

    def submit(self, name: str, inputs: bytes) -> Future[CallResult]:
        """Queue a call of the function with this name and pickled `Inputs`."""
        return self.run(attempts(functools.partial(self._call, name, inputs), self._retries))

    async def _call(self, name: str, inputs: bytes) -> CallResult:
        answer = await self.answer(name, inputs)
        return answer if isinstance(answer, Failure) else pickle.loads(answer)


async def attempts(call: Callable[[], Awaitable[CallResult]], retries: int) -> CallResult:
    """The result of the first call that succeeds, or of the last one."""
    result = await call()
    while retries > 0 and isinstance(result, Failure):
        result, retries = await call(), retries - 1
    return result
