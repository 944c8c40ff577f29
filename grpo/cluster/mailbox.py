"""What a cluster's workers and the process that has started them tell each other: what is shown, a wish to stop, the end.

    desk = open_desk()                      # where the run was started; the handle goes to the workers
    view = DeskView(desk)                   # in the first worker: a `terminal.View` whose calls are written down
    reader = Reader(desk, real_view)        # where the run was started
    reader.show()                           # ... now and then

The desk is a small Ray actor beside the process that has opened it: it outlives workers, and so does what they have told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray

from ..display.terminal import SampleRow, View
from ..display.view_text import When

Call = tuple[str, tuple[Any, ...]]
"""A method of the view, and its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run has ended.

    Attributes:
        summary: what `summary.json` says.
        error: what to tell the user, of one that starting again would not help.
        checkpoint: the newest one, of a run that a signal has ended; None where there is none.
        is_saved: whether everything is.
        has_finished: whether the run came to its end by itself.
    """

    summary: dict[str, Any] | None = None
    error: str | None = None
    checkpoint: Path | None = None
    is_saved: bool = False
    has_finished: bool = False


class Desk:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._is_asked_to_stop = False
        self._is_listened_to = False
        self._has_begun = False
        self._is_first_at_work = False
        self._outcome: Outcome | None = None

    def write(self, call: Call) -> None:
        """A call of the view, to be shown."""
        self._calls.append(call)
        self._has_begun = self._has_begun or call[0] in ("resumed", "step")

    def take(self) -> list[Call]:
        """What was written since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def lost(self, text: str) -> None:
        """Workers were lost, which is worth a line unless the run has ended with it. None is there to hear of a wish."""
        self._is_listened_to = False
        if self._outcome is None:
            self._calls.append(("note", (text,)))

    def has_begun(self) -> bool:
        """Whether the run folder is this run's by now: workers that start from here on go on in it."""
        return self._has_begun

    def ask_to_stop(self) -> bool:
        """The run is to end after its step. False: no worker has got as far as to hear of it."""
        self._is_asked_to_stop = True
        return self._is_listened_to

    def is_asked_to_stop(self) -> bool:
        """Whether it is."""
        self._is_listened_to = True
        return self._is_asked_to_stop

    def set_first_at_work(self, is_at_work: bool) -> None:
        """The first worker has started, or has left the run."""
        self._is_first_at_work = is_at_work

    def is_first_at_work(self) -> bool:
        """Whether it may still be saving something."""
        return self._is_first_at_work

    def has_failed(self) -> bool:
        """Whether the run has ended with an error, and all is saved that can be."""
        return self._outcome is not None and self._outcome.error is not None and not self._is_first_at_work

    def end(self, outcome: Outcome) -> None:
        """The run has ended, and is not to be started again. The first to say so is believed."""
        self._outcome = self._outcome or outcome

    def outcome(self) -> Outcome | None:
        """How the run has ended; None while it goes on."""
        return self._outcome


def this_node() -> dict[str, str]:
    """The label by which Ray knows this process's node."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def open_desk() -> Any:
    """A desk on this process's node; returns the actor's handle. Ray must be connected."""
    return ray.remote(Desk).options(num_cpus=0, label_selector=this_node()).remote()


class DeskView:
    """A `terminal.View` that writes every call down at a desk, and does not wait for that: a step is worth more than a line."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def start(self) -> None: ...
    def stage(self, text: str) -> None:
        self._write("stage", text)

    def note(self, text: str) -> None:
        self._write("note", text)

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._write("resumed", step, rows)

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        self._write("step", step, dict(metrics), dict(seconds_by_phase))

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._write("completions", step, list(rows))

    def evaluation(self, step: int, reward: float, when: When) -> None:
        self._write("evaluation", step, reward, when)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._write("finish", dict(summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...
    def _write(self, name: str, *arguments: Any) -> None:
        self._desk.write.remote((name, arguments))


class Reader:
    """Makes the written calls, on the real view.

    `finish` is held back: workers that are lost say it too, and the run goes on.
    """

    def __init__(self, desk: Any, view: View) -> None:
        self._desk = desk
        self._view = view
        self._finish: Call | None = None

    def show(self) -> None:
        """What was written since the last time."""
        for call in ray.get(self._desk.take.remote()):
            if call[0] == "finish":
                self._finish = call
            else:
                self._make(call)

    def finish(self) -> None:
        """The last word, if there was one."""
        if self._finish is not None:
            self._make(self._finish)

    def _make(self, call: Call) -> None:
        name, arguments = call
        getattr(self._view, name)(*arguments)
