"""Threads that each answer one call of a reward function at a time: what all pools have in common.

    pool = Pool(make_lane, num_lanes=8, retries=1)
    future = pool.submit(0, pickle.dumps(inputs))     # returns immediately; calls function 0
    future.result()                                   # a Returned, or a Failure with the reason
    pool.close()

Each thread takes calls from one queue and passes them to its lane: a process (`processes.py`), or a task in a Ray cluster
(`ray_pool.py`). Only this thread waits for the answer and sets the result, so every call has one result, however often it is
tried.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from .contract import CallResult, Failure, Returned, failure_of
from .texts import describe

Answer = bytes | Failure
"""A pickled `CallResult`, or why there is none."""


class Lane(Protocol):
    """Answers the calls of one thread, which creates it and alone uses it, except for `stop`."""

    def answer(self, number: int, inputs: bytes) -> Answer:
        """Call function `number` with pickled `Inputs`, once."""
        ...

    def stop(self) -> None:
        """From another thread: end the running call. No other call follows."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    number: int
    inputs: bytes
    future: Future[CallResult]


class Pool:
    """`num_lanes` concurrent calls. See the module's docstring.

    Args:
        make_lane: called once by each thread.
        retries: how often a failed call is repeated.
    """

    def __init__(self, make_lane: Callable[[], Lane], *, num_lanes: int, retries: int) -> None:
        self._make_lane, self._retries = make_lane, retries
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"rewards-{number}", daemon=True) for number in range(num_lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, number: int, inputs: bytes) -> Future[CallResult]:
        """Queue a call of function `number` with pickled `Inputs`. The future never raises what the function raises."""
        assert not self._is_closed
        future: Future[CallResult] = Future()
        self._calls.put(_Call(number, inputs, future))
        return future

    def close(self) -> None:
        """End all running calls and cancel those that still wait."""
        with self._lock:
            self._is_closed = True
            lanes = list(self._lanes)
        for lane in lanes:
            lane.stop()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """The loop of each thread."""
        lane = self._make_lane()
        with self._lock:
            self._lanes.append(lane)
            if self._is_closed:
                lane.stop()
        while (call := self._calls.get()) is not None:
            if self._is_closed or not call.future.set_running_or_notify_cancel():
                call.future.cancel()
                continue
            call.future.set_result(self._result(lane, call))
        lane.close()

    def _result(self, lane: Lane, call: _Call) -> CallResult:
        result: CallResult = Failure(reason="")
        for _ in range(self._retries + 1):
            result = self._attempt(lane, call)
            if isinstance(result, Returned) or self._is_closed:
                break
        return result

    def _attempt(self, lane: Lane, call: _Call) -> CallResult:
        try:
            answer = lane.answer(call.number, call.inputs)
        except Exception as error:  # any error: the thread must survive, since the caller waits for an answer
            return failure_of(error)
        if self._is_closed:
            return Failure(reason="the scorer was closed")
        if isinstance(answer, Failure):
            return answer
        try:
            return pickle.loads(answer)
        except Exception as error:  # objects that were passed to `log_extra` may raise anything when they are unpickled
            return Failure(reason=f"its answer cannot be unpickled here: {describe(error)}")
