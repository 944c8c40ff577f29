"""Calls of users' code: inline, in threads and on an event loop; time limits; global random states."""

import asyncio
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.common.random_states import random_states
from rankup.grpo.episodes import calls
from rankup.grpo.episodes.calls import Caller, Outcome
from rankup.rewards.contract import Interruption

SHORT = 0.05
LONG = 20.0  # never waited for, unless a test fails

MakeCaller = Callable[..., Caller]


@pytest.fixture
def make_caller(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeCaller]:
    monkeypatch.setattr(calls, "ANSWER_S", 0.3)
    callers: list[Caller] = []

    def make(timeout: float = LONG, workers: int = 0) -> Caller:
        callers.append(Caller(timeout, workers))
        return callers[-1]

    yield make
    for caller in callers:
        caller.close()


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What a tool that hangs waits for: set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def add(a: int, b: int) -> int:
    return a + b


async def add_async(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


class Adder:
    async def add(self, a: int, b: int) -> int:
        return a + b

    async def __call__(self, a: int, b: int) -> int:
        return a + b


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "function",
    [add, add_async, Adder().add, Adder(), functools.partial(add_async, b=2), lambda a, b: add_async(a, b), int.__add__],
    ids=["def", "async", "method", "object", "partial", "lambda", "builtin"],
)
def test_functions_of_every_kind_are_called(make_caller: MakeCaller, function: Any, workers: int) -> None:
    arguments = {} if function is int.__add__ else {"a": 1, "b": 2}
    function = functools.partial(int.__add__, 1, 2) if function is int.__add__ else function
    outcome = make_caller(workers=workers).call(function, arguments).result(LONG)
    assert (outcome.value, outcome.error, outcome.timed_out) == (3, None, False)
    assert 0 <= outcome.seconds < LONG


def test_an_inline_call_is_done_at_once_in_the_callers_thread(make_caller: MakeCaller) -> None:
    for caller, inline in ((make_caller(), False), (make_caller(workers=1), True)):
        future = caller.call(threading.current_thread, {}, inline=inline)
        assert future.done() and future.result().value is threading.current_thread()


def test_async_calls_share_one_loop_so_that_they_can_share_a_connection(make_caller: MakeCaller) -> None:
    async def loop() -> object:
        return asyncio.get_running_loop()

    caller = make_caller()
    assert caller.call(loop, {}).result(LONG).value is caller.call(loop, {}).result(LONG).value


class Odd(BaseException):
    pass


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


ERRORS = [
    ValueError("bad"),
    SystemExit(3),
    KeyboardInterrupt(),
    Odd("odd"),
    GeneratorExit(),
    StopIteration(1),
    TimeoutError("mine"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", ["inline", "thread", "async"])
def test_whatever_a_tool_raises_is_its_outcome(make_caller: MakeCaller, error: BaseException, way: str) -> None:
    # In a run, Ctrl-C is handled by `Interrupts`. With Python's own handler it could not be told from the user's exception.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:

        def fails() -> None:
            raise error

        async def fails_async() -> None:
            raise error

        caller = make_caller(workers=int(way == "thread"))
        outcome = caller.call(fails_async if way == "async" else fails, {}).result(LONG)
        assert not outcome.timed_out
        if isinstance(error, StopIteration) and way == "async":  # Python turns it into a RuntimeError
            assert isinstance(outcome.error, RuntimeError)
        else:
            assert outcome.error is error
        assert caller.call(add if way != "async" else add_async, {"a": 1, "b": 2}).result(LONG).value == 3
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interruption(143)], ids=["Ctrl-C", "signal"])
def test_a_signal_during_an_inline_call_is_not_the_tools_error(make_caller: MakeCaller, error: BaseException) -> None:
    def interrupted() -> None:
        random.seed(0)
        raise error

    random.seed(5)
    before = random.getstate()
    with pytest.raises(type(error)):
        make_caller().call(interrupted, {})
    assert random.getstate() == before


def test_the_text_for_the_model() -> None:
    assert Outcome(value="12 °C").text == "12 °C"
    assert Outcome(value={"t": ["°C", None]}).text == '{"t": ["°C", null]}'
    assert Outcome(value=12).text == "12" and Outcome(value=None).text == "None"
    assert Outcome(value={"t": {1}}).text == "{'t': {1}}"  # no JSON
    assert json.loads(Outcome(error=KeyError("x")).text) == {"error": "KeyError: 'x'"}
    timeout = Outcome(error=TimeoutError("timed out after 10 s"), timed_out=True)
    assert timeout.text == '{"error": "timed out after 10 s"}'
    assert Outcome(value="a\ud800b").text == "a?b" and Outcome(error=ValueError("\ud800")).text == '{"error": "ValueError: ?"}'
    for broken in (Outcome(value=UnprintableError()), Outcome(error=UnprintableError())):
        assert "__str__ of UnprintableError" in json.loads(broken.text)["error"]


@settings(max_examples=30)
@given(
    value=st.recursive(st.none() | st.text() | st.binary() | st.floats(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_the_text_can_always_be_encoded(value: Any) -> None:
    Outcome(value=value).text.encode()


@pytest.mark.parametrize("workers", [1, 3])
def test_check_16_threads_that_hang_are_replaced(make_caller: MakeCaller, release: threading.Event, workers: int) -> None:
    caller = make_caller(timeout=SHORT, workers=workers)
    hanging = [caller.call(release.wait, {}) for _ in range(2 * workers)]
    quick = caller.call(add, {"a": 1, "b": 2}).result(LONG)
    assert quick.value == 3 and not quick.timed_out  # it was queued for twice the time limit, which did not count
    for future in hanging:
        outcome = future.result(LONG)
        assert outcome.timed_out and str(outcome.error) == f"timed out after {SHORT:g} s"
        assert outcome.text == '{"error": "timed out after 0.05 s"}'


def test_a_thread_that_ends_after_its_time_limit_changes_nothing(make_caller: MakeCaller, release: threading.Event) -> None:
    caller = make_caller(timeout=SHORT, workers=1)
    threads: list[threading.Thread] = []

    def late() -> str:
        threads.append(threading.current_thread())
        release.wait()
        return "late"

    future = caller.call(late, {})
    assert future.result(LONG).timed_out
    release.set()
    threads[0].join(LONG)
    assert not threads[0].is_alive() and future.result().timed_out
    names = {caller.call(threading.get_ident, {}).result(LONG).value for _ in range(5)}
    assert len(names) == 1  # one worker, as before


def test_check_16_an_async_call_is_cancelled_at_its_time_limit(make_caller: MakeCaller) -> None:
    cleaned = threading.Event()

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    caller = make_caller(timeout=SHORT)
    assert caller.call(hangs, {}).result(LONG).timed_out
    assert cleaned.wait(LONG)


def test_check_16_an_async_call_that_ignores_its_cancellation_is_survived(make_caller: MakeCaller) -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    caller = make_caller(timeout=SHORT)
    assert caller.call(stubborn, {}).result(LONG).timed_out
    assert caller.call(add_async, {"a": 1, "b": 2}).result(LONG).value == 3


def test_check_16_an_async_call_that_blocks_its_loop_is_survived(
    make_caller: MakeCaller, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    async def blocks() -> None:
        release.wait()

    caller = make_caller(timeout=SHORT)
    blocking, behind = caller.call(blocks, {}), caller.call(add_async, {"a": 1, "b": 2})
    assert blocking.result(LONG).timed_out and behind.result(LONG).timed_out
    assert caller.call(add_async, {"a": 1, "b": 2}).result(LONG).value == 3
    assert "blocks its event loop" in caplog.text


def test_an_async_call_that_cancels_itself_has_an_error(make_caller: MakeCaller) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    caller = make_caller()
    outcome = caller.call(cancelled, {}).result(LONG)
    assert isinstance(outcome.error, asyncio.CancelledError) and not outcome.timed_out


def test_async_calls_run_at_the_same_time(make_caller: MakeCaller) -> None:
    arrived = 0

    async def meet() -> None:
        nonlocal arrived
        arrived += 1
        while arrived < 64:
            await asyncio.sleep(0.001)

    caller = make_caller()
    outcomes = [future.result() for future in wait([caller.call(meet, {}) for _ in range(64)], timeout=LONG).done]
    assert len(outcomes) == 64 and all(outcome.error is None for outcome in outcomes)


def test_threads_run_at_the_same_time_and_no_more_than_workers(make_caller: MakeCaller) -> None:
    barrier, running, most = threading.Barrier(3), 0, 0
    lock = threading.Lock()

    def meet() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(LONG)
        with lock:
            running -= 1

    caller = make_caller(workers=3)
    futures = [caller.call(meet, {}) for _ in range(6)]
    assert all(future.result(LONG).error is None for future in futures) and most == 3


def test_what_is_open_when_the_caller_is_closed_gets_an_error(release: threading.Event) -> None:
    caller = Caller(LONG, workers=1)
    begun = threading.Event()

    def hang() -> None:
        begun.set()
        release.wait()

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    running, queued, awaited = caller.call(hang, {}), caller.call(add, {"a": 1, "b": 2}), caller.call(wait_for_ever, {})
    assert begun.wait(LONG)
    caller.close()
    assert queued.result(LONG).error is not None and awaited.result(LONG).error is not None
    release.set()
    assert running.result(LONG).value is None


SCRIPT = """
import asyncio, threading
from rankup.grpo.episodes.calls import Caller
caller = Caller(0.05, workers=1)
async def blocks(): threading.Event().wait()
async def hangs(): await asyncio.Event().wait()
futures = [caller.call(threading.Event().wait, {}), caller.call(hangs, {}), caller.call(blocks, {})]
print([future.result(20).timed_out for future in futures])
"""


@pytest.mark.slow
@pytest.mark.parametrize("close", ["", "caller.close()"])
def test_check_16_a_process_whose_tools_hang_can_exit(close: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + close], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[True, True, True]"), done.stderr


def draw_and_reseed() -> tuple[float, float, float]:
    drawn = random.random(), float(np.random.random()), torch.rand(1).item()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return drawn


def test_check_22_an_inline_call_neither_changes_nor_depends_on_the_random_states(make_caller: MakeCaller) -> None:
    caller = make_caller()
    drawn = []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        before = random_states()
        drawn += [caller.call(draw_and_reseed, {}, seed=seed).result().value for seed in (7, 7, 8)]
        assert random_states() == before
    assert len(set(drawn)) == 2 and drawn[:3] == drawn[3:] and drawn[0] == drawn[1] != drawn[2]


def test_without_a_seed_a_call_draws_from_where_the_states_are(make_caller: MakeCaller) -> None:
    random.seed(3)
    expected = random.Random(3).random()
    caller = make_caller()
    assert [caller.call(random.random, {}).result().value for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 + 1, 10**30])
def test_any_number_is_a_seed(make_caller: MakeCaller, seed: int) -> None:
    caller = make_caller()
    values = [caller.call(draw_and_reseed, {}, seed=seed).result() for _ in range(2)]
    assert values[0].error is None and values[0].value == values[1].value


def test_the_states_are_restored_when_a_call_fails(make_caller: MakeCaller) -> None:
    def fails() -> None:
        draw_and_reseed()
        sys.exit("no")

    before = random_states()
    assert isinstance(make_caller().call(fails, {}, seed=1).result().error, SystemExit)
    assert random_states() == before


def test_an_isolated_rollout_restores_the_states_whatever_runs_beside(make_caller: MakeCaller) -> None:
    async def reseed() -> None:
        draw_and_reseed()

    caller = make_caller(workers=1)
    before = random_states()
    with caller.isolated(seed=4):
        futures: list[Future[Outcome]] = [caller.call(draw_and_reseed, {}), caller.call(reseed, {})]
        assert all(future.result(LONG).error is None for future in futures)
        assert random_states() != before
    assert random_states() == before


def test_an_inline_call_costs_much_less_than_a_millisecond(make_caller: MakeCaller) -> None:
    caller = make_caller()

    def seconds() -> float:
        start = time.perf_counter()
        for seed in range(20):
            caller.call(add, {"a": 1, "b": 2}, seed=seed)
        return (time.perf_counter() - start) / 20

    assert min(seconds() for _ in range(10)) < 1e-3
