"""What a call says to the model, and calls after the run has ended."""

import asyncio
import json
import sys
import threading

import pytest

from rankup.grpo.episodes.calls import Caller, Outcome

LONG = 20.0  # never waited for, unless a test fails


def add(a: int, b: int) -> int:
    return a + b


async def add_async(a: int, b: int) -> int:
    return a + b


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExitsAsText:
    def __str__(self) -> str:
        sys.exit(3)


class FalsyError(Exception):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("outcome", "is_result"),
    [
        (Outcome(value=3), True),
        (Outcome(value={"error": "an answer of the tool"}), True),
        (Outcome(value=10**6000), False),  # Python writes no integers as long as this
        (Outcome(value=ExitsAsText()), False),
        (Outcome(error=FalsyError("no")), False),
        (Outcome(error=UnprintableError()), False),
    ],
)
def test_what_has_no_text_is_no_result(outcome: Outcome, is_result: bool) -> None:
    text, told = outcome.told()
    assert told is is_result and (is_result or "error" in json.loads(text))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_caller_that_was_closed_can_be_opened_again(workers: int) -> None:
    release = threading.Event()
    caller = Caller(LONG, workers)
    if workers:
        caller.call(release.wait, {})  # its thread is left behind
    caller.close()
    assert isinstance(caller.call(add, {"a": 1, "b": 2}).result(LONG).error, asyncio.CancelledError)
    caller.reopen()
    for function in (add, add_async):
        assert caller.call(function, {"a": 1, "b": 2}).result(LONG).value == 3
    release.set()
    caller.close()
