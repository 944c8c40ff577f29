"""Threads that have calls of reward functions answered, one call at a time each: what all pools have in common.

    pool = Pool(make_lane, num_lanes=8, retries=1)
    future = pool.submit(0, inputs)           # at once; function 0
    future.result()                           # a Returned, or a Failure that says why there is none
    pool.close()

A thread takes calls from one queue and gives each to its lane: a process (`processes.py`), or a place in a Ray cluster
(`ray_pool.py`). It alone waits for the answer and hands it on, so every call has one result, however often it is tried.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from .contract import CallResult, Failure, Inputs, Returned, failure_of

Answer = bytes | Failure
"""A pickled `CallResult`, or why there is none."""


class Lane(Protocol):
    """What answers the calls of one thread; made on it, and used by it but for `stop`."""

    def answer(self, number: int, inputs: bytes) -> Answer:
        """Call function `number` with pickled `Inputs`, once."""
        ...

    def stop(self) -> None:
        """From another thread: end the call that is being answered. There will be no further one."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    number: int
    inputs: bytes
    future: Future[CallResult]


class Pool:
    """`num_lanes` calls at once. See the module's docstring.

    Args:
        make_lane: called by every thread for its lane.
        retries: how often a call that failed is tried again.
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

    def submit(self, number: int, inputs: Inputs) -> Future[CallResult]:
        """Queue a call of function `number`. The future's result tells a failure; its exception is none of the user's."""
        return self.submit_pickled(number, pickle.dumps(inputs))

    def submit_pickled(self, number: int, inputs: bytes) -> Future[CallResult]:
        """The same with `Inputs` that are pickled already: several functions get the same."""
        assert not self._is_closed
        future: Future[CallResult] = Future()
        self._calls.put(_Call(number, inputs, future))
        return future

    def close(self) -> None:
        """End all calls; those that have not been answered are cancelled."""
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
        """A thread's life: one call at a time."""
        lane = self._make_lane()
        with self._lock:
            self._lanes.append(lane)
            if self._is_closed:
                lane.stop()
        while (call := self._calls.get()) is not None:
            if self._is_closed or not call.future.set_running_or_notify_cancel():
                call.future.cancel()
                continue
            call.future.set_result(self._outcome(lane, call))
        lane.close()

    def _outcome(self, lane: Lane, call: _Call) -> CallResult:
        outcome: CallResult = Failure(reason="")
        for _ in range(self._retries + 1):
            outcome = self._attempt(lane, call)
            if isinstance(outcome, Returned) or self._is_closed:
                break
        return outcome

    def _attempt(self, lane: Lane, call: _Call) -> CallResult:
        try:
            answer = lane.answer(call.number, call.inputs)
        except Exception as error:  # whatever it is, this thread has to go on: the caller waits for an answer
            return failure_of(error)
        if self._is_closed:
            return Failure(reason="the scorer was closed")
        return answer if isinstance(answer, Failure) else _read(answer)


def _read(answer: bytes) -> CallResult:
    try:
        return pickle.loads(answer)
    except Exception as error:  # what `log_extra` was given may fail in any way
        return Failure(reason=f"its answer cannot be read here: {type(error).__name__}: {error}")
