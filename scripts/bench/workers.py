"""Sides of a benchmark in separate processes, measured one at a time.

    with Worker("base", "rollout_sides:StockSide", model_path=path) as base:
        base.call("sample", prompts)

    turns = Turns()
    times = turns.interleave({"base": base, "rankup": rankup}, 5, lambda name: ...)
    turns.idle_share                        # processor time of the waiting processes, as a share of a core
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from common import interleave

Measurement = TypeVar("Measurement")


class Worker:
    """An object in a separate process, which sleeps until one of its methods is called.

    Args:
        name: for messages.
        spec: `module:class` of the object. Only the process imports the module.
        options: keyword arguments of the class; they are pickled.
    """

    def __init__(self, name: str, spec: str, **options: Any) -> None:
        print(f"starting {name}", flush=True)
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would inherit the state of running threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, options), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the object and return its result. Exits if the process dies."""
        self._connection.send((method, args, kwargs))
        return self._receive()

    def cpu_seconds(self) -> float:
        """Processor time of the process and its children so far."""
        import psutil

        process = psutil.Process(self._process.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit(f"the process of {self.name} ended early; its output is above")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._connection.close()  # which ends the process: see `answer_calls`
        if kind is None:
            self._process.join(timeout=30)
        self._process.kill()  # after an error or Ctrl-C without waiting for the current call
        self._process.join()


class Turns:
    """Measures one worker at a time. `idle_share`: the most that the waiting ones used meanwhile, as a share of a core."""

    def __init__(self) -> None:
        self.idle_share = 0.0

    def interleave(
        self, workers: Mapping[str, Worker], repeats: int, measure: Callable[[str], Measurement]
    ) -> dict[str, list[Measurement]]:
        """`common.interleave` over the names of the workers. `measure` must call only the worker of that name."""

        def measure_alone(name: str) -> Measurement:
            idle = [worker for other, worker in workers.items() if other != name]
            started, before = time.perf_counter(), sum(worker.cpu_seconds() for worker in idle)
            measured = measure(name)
            used = sum(worker.cpu_seconds() for worker in idle) - before
            self.idle_share = max(self.idle_share, used / (time.perf_counter() - started))
            return measured

        return interleave(workers, repeats, measure_alone)


class PacedSide:
    """A side around a trainer whose `train()` stops after each step until the next `call("step")`.

    A subclass implements `_train` and has its trainer call `pause` after each step.
    """

    connection: Connection

    def step(self) -> dict[str, Any]:
        """Let the trainer take a step. Returns what it hands to `pause`, and the `seconds` of the step."""
        self._started = time.perf_counter()
        self._train()
        raise RuntimeError("training ended between two steps; its output is above")

    @property
    def elapsed(self) -> float:
        """Seconds of the current step so far."""
        return time.perf_counter() - self._started

    def pause(self, report: Mapping[str, Any]) -> None:
        """Answer the call of `step` that led here, and return at the next one."""
        self.connection.send({"seconds": self.elapsed, **report})
        answer_calls(self.connection, self, until="step")
        self._started = time.perf_counter()

    def _train(self) -> None:
        raise NotImplementedError


def answer_calls(connection: Connection, served: object, *, until: str | None = None) -> None:
    """Call the methods that the other end asks for, until it asks for `until`. Ends the process when it closes."""
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:
            sys.stdout.flush()
            os._exit(0)  # without the clean-up of trainers and engines, which would save or wait
        if method == until:
            return
        connection.send(getattr(served, method)(*args, **kwargs))


def _serve(connection: Connection, spec: str, options: dict[str, Any]) -> None:
    from rankup.grpo.common.quiet import quiet_loggers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the first one decides
    quiet_loggers()  # before the import: some libraries log while they are imported
    module, _, name = spec.partition(":")
    served = getattr(importlib.import_module(module), name)(**options)
    if isinstance(served, PacedSide):
        served.connection = connection
    connection.send(None)
    answer_calls(connection, served)
