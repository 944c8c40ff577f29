"""Calls of users' tools and environments: inline, in threads, or on an event loop, under a time limit. A call never fails.

    caller = Caller(timeout=10, workers=4)
    future = caller.call(search, {"query": "GRPO"})     # returns immediately; `search` may hang
    outcome = future.result()
    outcome.text                                        # what the model sees: the result, or {"error": "timed out after 10 s"}
    caller.close()

`async def` functions run on one event loop in the background, so that several calls can use the same connection. All others run
in `workers` threads, or without workers inline: before `call` returns, one after the other, without a time limit, and with
random states of their own. The time limit counts from when a call starts to run, not while it waits for a thread.

After its time limit an async call is cancelled. A thread cannot be: it is abandoned, and another one takes its place, so that
what hangs blocks neither later calls nor the end of the process. A loop that a call blocks (`time.sleep` in an `async def`) is
replaced too.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ...rewards.contract import is_async, is_interruption
from ...rewards.pool import BackgroundLoop
from ...rewards.texts import describe
from ..common.random_states import Preserved, preserved_random_states

logger = logging.getLogger(__name__)

SEED_BITS = 56
"""Of a seed of global random generators."""

ANSWER_S = 2.0
"""Time in which an event loop runs something trivial, or is blocked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call returned or raised.

    Attributes:
        value: what it returned; None if it failed.
        error: what it raised, SystemExit and KeyboardInterrupt of its own included; after a time limit a TimeoutError.
        timed_out: the time limit ended it.
        seconds: for which it ran.
    """

    value: Any = None
    error: BaseException | None = None
    timed_out: bool = False
    seconds: float = 0.0

    def told(self) -> tuple[str, bool]:
        """The content of a tool message, and whether it is a result: a string as it is, lists and dictionaries as JSON, and
        `{"error": ...}`, also for a value that has no text."""
        if self.error is not None:
            return error_text(str(self.error) if self.timed_out else reason_of(self.error)), False
        try:
            return encodable(_as_text(self.value)), True
        except BaseException as error:  # of a `__str__` of the user's
            if is_interruption(error):
                raise
            return error_text(f"{type(error).__name__} in __str__ of {type(self.value).__name__}"), False

    @property
    def text(self) -> str:
        """What the model sees; see `told`."""
        return self.told()[0]


def reason_of(error: BaseException) -> str:
    """Type and message of an error that a user's code raised; its `__str__` may raise too."""
    try:
        return describe(error)
    except BaseException as another:
        if is_interruption(another):
            raise
        return f"{type(another).__name__} in __str__ of {type(error).__name__}"


def error_text(sentence: str) -> str:
    """The content of a tool message that reports an error."""
    return encodable(json.dumps({"error": sentence}, ensure_ascii=False))


def encodable(text: str) -> str:
    """The text with "?" for the halves of surrogate pairs, which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()


def _as_text(value: object) -> str:
    if isinstance(value, dict | list):
        try:
            return json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # it holds what is no JSON, or itself
            pass
    return str(value)


class _Loop(BackgroundLoop):
    """An event loop for users' coroutines, and the futures of those that have not ended."""

    def __init__(self) -> None:
        super().__init__()
        self.open: set[Future[Outcome]] = set()

    def is_blocked(self) -> bool:
        """Whether it runs nothing, since some coroutine does not give way."""
        answer = self.run(asyncio.sleep(0))
        wait([answer], timeout=ANSWER_S)
        return not answer.done()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    function: Callable[..., Any]
    kwargs: Mapping[str, Any]
    future: Future[Outcome]


class Caller:
    """See the module's docstring.

    Attributes:
        workers: threads for functions that are not async; 0: they are called inline.

    Args:
        timeout: seconds that a call may run.
    """

    def __init__(self, timeout: float, workers: int = 0) -> None:
        self._timeout = timeout
        self.workers = workers
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = 0
        self._loop: _Loop | None = None
        self._clock: BackgroundLoop | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def call(
        self, function: Callable[..., Any], kwargs: Mapping[str, Any], *, seed: int | None = None, inline: bool = False
    ) -> Future[Outcome]:
        """Call a function with keyword arguments. The future has its outcome; it is done already if the call was inline.

        Awaitables that a function returns are awaited, so it need not be an `async def`.

        Args:
            seed: of Python's, NumPy's and torch's global generators while a call runs inline, or None: they stay as they are.
                Afterwards their states are restored. What runs beside shares them: see `isolated`.
            inline: call it inline even if there are workers: what is quick need not wait for a thread.

        Raises:
            KeyboardInterrupt, Interruption: a signal to this process, during an inline call.
        """
        if self._is_closed:
            return self._refused()
        if is_async(function):
            return self._awaited(lambda: function(**kwargs))
        called = self._queued(function, kwargs) if self.workers and not inline else self._inline(function, kwargs, seed)
        outcome: Future[Outcome] = Future()
        called.add_done_callback(lambda done: self._pass_on(done.result(), outcome))
        return outcome

    def isolated(self, seed: int | None) -> AbstractContextManager[Preserved]:
        """Within the block, users' code may use the global random generators, which begin with the seed; their states are
        restored at its end. None: another seed each time.

        For a whole rollout whose calls run in threads or on the event loop.
        """
        return preserved_random_states(secrets.randbits(SEED_BITS) if seed is None else seed)

    def reopen(self) -> None:
        """Take calls again after `close`."""
        with self._lock:
            if self._is_closed:
                self._jobs, self._threads, self._is_closed = SimpleQueue(), 0, False

    def close(self) -> None:
        """Cancel what runs. Threads and loops that hang are abandoned. Later calls, and those that still wait, get an error,
        until `reopen`."""
        with self._lock:
            self._is_closed = True
            loops, self._loop, self._clock = [loop for loop in (self._loop, self._clock) if loop], None, None
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if job is not None:
                self._refused(job.future)
        for _ in range(self._threads):
            self._jobs.put(None)
        for loop in loops:
            closing = threading.Thread(target=loop.close, daemon=True)
            closing.start()
            closing.join(ANSWER_S)  # longer only if a coroutine blocks the loop, or ignores that it is cancelled
            if isinstance(loop, _Loop):
                for future in list(loop.open):
                    self._refused(future)

    def _pass_on(self, outcome: Outcome, future: Future[Outcome]) -> None:
        """Settle the future with the outcome, or with that of the awaitable which the call has returned."""
        if outcome.error is not None or not inspect.isawaitable(outcome.value):
            _settle(future, outcome)
            return
        awaitable = outcome.value
        self._awaited(lambda: awaitable).add_done_callback(lambda done: _settle(future, done.result()))

    def _inline(self, function: Callable[..., Any], kwargs: Mapping[str, Any], seed: int | None) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        with preserved_random_states(seed):
            outcome = _outcome_of(function, kwargs)
        if outcome.error is not None and is_interruption(outcome.error):
            raise outcome.error
        _settle(future, outcome)
        return future

    def _queued(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        with self._lock:
            missing = self._threads < self.workers
            self._threads += missing
            jobs = self._jobs
        if missing:
            self._start_thread(jobs)
        jobs.put(_Job(function=function, kwargs=kwargs, future=future))
        return future

    def _start_thread(self, jobs: SimpleQueue[_Job | None]) -> None:
        threading.Thread(target=self._work, args=(jobs,), name="tools", daemon=True).start()

    def _work(self, jobs: SimpleQueue[_Job | None]) -> None:
        """A worker: one call after the other, until one is abandoned, for another thread has then taken this one's place."""
        while (job := jobs.get()) is not None:
            self._limit(job.future, lambda: self._start_thread(jobs))
            if not _settle(job.future, _outcome_of(job.function, job.kwargs)):
                return

    def _awaited(self, function: Callable[[], Awaitable[Any]]) -> Future[Outcome]:
        """Await what the function returns, on the event loop."""
        future: Future[Outcome] = Future()
        with self._lock:
            if self._is_closed:
                return self._refused(future)
            loop = self._loop = self._loop or _Loop()
            loop.open.add(future)
        future.add_done_callback(loop.open.discard)
        loop.run(self._limited(function, future, loop))
        return future

    async def _limited(self, function: Callable[[], Awaitable[Any]], future: Future[Outcome], loop: _Loop) -> None:
        """Await a call on the loop that this runs on. Nothing is raised: SystemExit would end the loop."""
        task, running = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._limit(future, lambda: self._cancel(task, running, loop))
        start = time.perf_counter()
        value, error = None, None
        try:
            value = await function()
        except BaseException as raised:
            error = raised
        _settle(future, Outcome(value=value, error=error, seconds=time.perf_counter() - start))

    def _cancel(self, task: asyncio.Task[Any], running: asyncio.AbstractEventLoop, loop: _Loop) -> None:
        """Cancel a call after its time limit. If its loop does not react, later calls get a new one."""
        running.call_soon_threadsafe(task.cancel)
        threading.Thread(target=self._replace_if_blocked, args=(loop,), daemon=True).start()

    def _replace_if_blocked(self, loop: _Loop) -> None:
        if self._is_closed or not loop.is_blocked():
            return
        with self._lock:
            if self._loop is loop:
                self._loop = None
                logger.warning("an async tool blocks its event loop: call what waits with `await`, or make the tool a `def`")
            blocked = list(loop.open)
        for future in blocked:
            _settle(future, self._timed_out())
        loop.close()  # when the call lets it

    def _limit(self, future: Future[Outcome], abandon: Callable[[], None]) -> None:
        """From now on, the call has `timeout` seconds; then its future is settled, and `abandon` called."""
        with self._lock:
            if self._is_closed:
                return
            self._clock = self._clock or BackgroundLoop()
            watch = self._clock.run(self._watch(future, abandon))
        future.add_done_callback(lambda _: watch.cancel())

    async def _watch(self, future: Future[Outcome], abandon: Callable[[], None]) -> None:
        await asyncio.sleep(self._timeout)
        if _settle(future, self._timed_out()):
            abandon()

    def _refused(self, future: Future[Outcome] | None = None) -> Future[Outcome]:
        """Settle a future since the caller is closed."""
        future = future or Future()
        _settle(future, Outcome(error=asyncio.CancelledError("the run has ended")))
        return future

    def _timed_out(self) -> Outcome:
        error = TimeoutError(f"timed out after {self._timeout:g} s")
        return Outcome(error=error, timed_out=True, seconds=self._timeout)


def _outcome_of(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Outcome:
    start = time.perf_counter()
    try:
        value, error = function(**kwargs), None
    except BaseException as raised:  # a user's function may raise anything, and call sys.exit()
        value, error = None, raised
    return Outcome(value=value, error=error, seconds=time.perf_counter() - start)


def _settle(future: Future[Outcome], outcome: Outcome) -> bool:
    """Give a call its outcome, unless it has one already: after its time limit it may still end."""
    try:
        future.set_result(outcome)
    except InvalidStateError:
        return False
    return True
