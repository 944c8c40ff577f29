"""The skeleton of the benchmarks: the order of interleaved repeats, sides in separate processes, and paced trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]
SIDES = """
import time

from workers import PacedSide


class Counter:
    def __init__(self, *, start):
        self.value = start

    def add(self, count):
        self.value += count
        return self.value

    def fail(self):
        raise SystemExit("out of order")


class Trainer(PacedSide):
    def _train(self):
        for step in range(3):
            time.sleep(0.05)
            self.pause({"step": step})

    def describe(self):
        return "a trainer"
"""


@pytest.fixture
def workers(bench_module: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, and `sides_of_a_test`, a module with sides for its processes."""
    (tmp_path / "sides_of_a_test.py").write_text(SIDES)
    monkeypatch.syspath_prepend(tmp_path)
    return bench_module("workers")


def test_every_other_round_is_measured_in_reverse_order(bench_module: Load):
    calls: list[str] = []
    found = bench_module("common").interleave("abc", 3, lambda name: calls.append(name) or len(calls))
    assert "".join(calls) == "abc" + "cba" + "abc"
    assert found == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert list(found) == ["a", "b", "c"]


def test_a_worker_keeps_its_object_between_calls_and_ends_with_its_block(workers: Any):
    with workers.Worker("a counter", "sides_of_a_test:Counter", start=5) as worker:
        assert worker.call("add", 2) == 7
        assert worker.call("add", count=3) == 10
        assert worker.cpu_seconds() > 0
    assert not worker._process.is_alive()


def test_a_worker_that_dies_ends_the_benchmark_with_its_name(workers: Any):
    with (
        pytest.raises(SystemExit, match="the process of a counter ended early"),
        workers.Worker("a counter", "sides_of_a_test:Counter", start=0) as worker,
    ):
        worker.call("fail")
    assert not worker._process.is_alive()


def test_turns_measure_each_worker_while_the_others_wait(workers: Any):
    with (
        workers.Worker("one", "sides_of_a_test:Counter", start=0) as one,
        workers.Worker("two", "sides_of_a_test:Counter", start=10) as two,
    ):
        pair, turns = {"one": one, "two": two}, workers.Turns()
        assert turns.interleave(pair, 2, lambda name: pair[name].call("add", 1)) == {"one": [1, 2], "two": [11, 12]}
        assert turns.idle_share >= 0


def test_a_paced_trainer_takes_one_step_per_call_and_answers_others_in_between(workers: Any):
    with workers.Worker("a trainer", "sides_of_a_test:Trainer") as worker:
        steps = [worker.call("step") for _ in range(2)]
        assert worker.call("describe") == "a trainer"
        steps.append(worker.call("step"))
        assert [step["step"] for step in steps] == [0, 1, 2]
        assert all(0.05 <= step["seconds"] < 5 for step in steps)
    assert not worker._process.is_alive()


def test_a_paced_trainer_whose_run_ends_is_an_error(workers: Any):
    with (
        pytest.raises(SystemExit, match="the process of a trainer ended early"),
        workers.Worker("a trainer", "sides_of_a_test:Trainer") as worker,
    ):
        for _ in range(4):
            worker.call("step")
