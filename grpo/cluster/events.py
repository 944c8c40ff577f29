"""Events that the main worker of a cluster run sends to the process that shows it: one for each call of the view.

    EventView(send)                 # a `View` on the worker, which sends its calls as events
    event.show(view)                # in the process that started the run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..display.view import SampleRow, View
from ..display.view_text import When


class Event(NamedTuple):
    """A call of the view: its method and the arguments."""

    method: Literal["stage", "note", "resumed", "step", "completions", "evaluation", "finish"]
    arguments: tuple[Any, ...]

    def show(self, view: View) -> None:
        """Make the call on the real view."""
        getattr(view, self.method)(*self.arguments)


class EventView(View):
    """A `View` that sends every call as an event and does not wait for it: a step matters more than a line."""

    def __init__(self, send: Callable[[Event], object]) -> None:
        self._send = send

    def stage(self, text: str) -> None:
        self._send(Event("stage", (text,)))

    def note(self, text: str) -> None:
        self._send(Event("note", (text,)))

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._send(Event("resumed", (step, rows)))

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        self._send(Event("step", (step, metrics, seconds_by_phase)))

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._send(Event("completions", (step, rows)))

    def evaluation(self, step: int, metrics: Mapping[str, float], when: When) -> None:
        self._send(Event("evaluation", (step, metrics, when)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._send(Event("finish", (summary,)))
