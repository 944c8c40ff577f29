"""Events that the main worker of a cluster run sends to the process that shows it: one for each call of the view.

    EventView(send)                 # a `terminal.View` on the worker, which sends its calls as events
    event.show(view)                # in the process that started the run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ..display.terminal import SampleRow, View
from ..display.view_text import When


class Event(Protocol):
    """Something to show."""

    def show(self, view: View) -> None:
        """Make the call on the real view."""
        ...


@dataclass(frozen=True, slots=True)
class StageEvent:
    text: str

    def show(self, view: View) -> None:
        view.stage(self.text)


@dataclass(frozen=True, slots=True)
class NoteEvent:
    text: str

    def show(self, view: View) -> None:
        view.note(self.text)


@dataclass(frozen=True, slots=True)
class ResumedEvent:
    step: int
    rows: Sequence[Mapping[str, Any]]

    def show(self, view: View) -> None:
        view.resumed(self.step, self.rows)


@dataclass(frozen=True, slots=True)
class StepEvent:
    step: int
    metrics: Mapping[str, float]
    seconds_by_phase: Mapping[str, float]

    def show(self, view: View) -> None:
        view.step(self.step, self.metrics, self.seconds_by_phase)


@dataclass(frozen=True, slots=True)
class CompletionsEvent:
    step: int
    rows: Sequence[SampleRow]

    def show(self, view: View) -> None:
        view.completions(self.step, self.rows)


@dataclass(frozen=True, slots=True)
class EvaluationEvent:
    step: int
    reward: float
    when: When

    def show(self, view: View) -> None:
        view.evaluation(self.step, self.reward, self.when)


@dataclass(frozen=True, slots=True)
class FinishEvent:
    summary: Mapping[str, Any]

    def show(self, view: View) -> None:
        view.finish(self.summary)


class EventView:
    """A `terminal.View` that sends every call as an event and does not wait for it: a step matters more than a line."""

    def __init__(self, send: Callable[[Event], object]) -> None:
        self._send = send

    def start(self) -> None: ...
    def stage(self, text: str) -> None:
        self._send(StageEvent(text))

    def note(self, text: str) -> None:
        self._send(NoteEvent(text))

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._send(ResumedEvent(step, rows))

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        self._send(StepEvent(step, dict(metrics), dict(seconds_by_phase)))

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._send(CompletionsEvent(step, list(rows)))

    def evaluation(self, step: int, reward: float, when: When) -> None:
        self._send(EvaluationEvent(step, reward, when))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._send(FinishEvent(dict(summary)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...
