"""A small Ray actor between the workers of a run and the process that started them: events to show, stop requests, the outcome.

    mailbox = open_mailbox()                # in the process that starts the run; the handle goes to the workers
    view = EventView(mailbox.post.remote)   # on the main worker
    for event in ray.get(mailbox.take.remote()):
        event.show(real_view)               # again and again, in the process that started the run

The mailbox runs on the node of the process that opened it, so it and its events survive lost workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from .events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run has ended.

    Attributes:
        summary: the content of `summary.json`.
        error: for the user, if restarting the workers would not fix it.
        checkpoint: the newest one of an interrupted run; None if there is none.
        is_saved: whether all progress is saved.
        is_complete: whether the run did all its steps.
    """

    summary: dict[str, Any] | None = None
    error: str | None = None
    checkpoint: Path | None = None
    is_saved: bool = False
    is_complete: bool = False


class Mailbox:
    """See the module's docstring. Its methods are called through Ray, one at a time."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._finish: list[Event] = []
        self._stop_requested = False
        self._has_subscriber = False
        self._has_begun = False
        self._main_is_working = False
        self._outcome: Outcome | None = None

    def post(self, event: Event) -> None:
        """Add an event to show. `finish` is held back: lost workers post it too, and the run then continues."""
        if event.method == "finish":
            self._finish = [event]
        else:
            self._events.append(event)
        self._has_begun = self._has_begun or event.method in ("resumed", "step")

    def take(self, *, is_over: bool = False) -> list[Event]:
        """Remove and return the events posted since the last call; with `is_over` the last `finish` behind them."""
        events, self._events = self._events, []
        return [*events, *self._finish] if is_over else events

    def report_failure(self, text: str) -> None:
        """Workers were lost: show it unless the run has ended. Until they restart, stop requests have no subscriber."""
        self._has_subscriber = False
        if self._outcome is None:
            self._events.append(Event("note", (text,)))

    def has_begun(self) -> bool:
        """Whether the run folder belongs to this run by now: workers that start from here on resume in it."""
        return self._has_begun

    def request_stop(self) -> bool:
        """Ask the workers to stop after their step; returns whether any worker polls for it."""
        self._stop_requested = True
        return self._has_subscriber

    def poll_stop(self) -> bool:
        """Whether a stop was requested. The main worker polls it between steps."""
        self._has_subscriber = True
        return self._stop_requested

    def set_main_is_working(self, is_working: bool) -> None:
        """Whether the main worker may still have something to save."""
        self._main_is_working = is_working

    def main_is_working(self) -> bool:
        """See `set_main_is_working`."""
        return self._main_is_working

    def end(self, outcome: Outcome) -> None:
        """Report how the run has ended; the first report counts."""
        self._outcome = self._outcome or outcome

    def has_failed(self) -> bool:
        """Whether the run has ended with an error that a restart would not fix, and the main worker has saved its progress."""
        return self._outcome is not None and self._outcome.error is not None and not self._main_is_working

    def outcome(self) -> Outcome | None:
        """How the run has ended; None while it continues."""
        return self._outcome


def this_node() -> dict[str, str]:
    """Ray's label of this process's node."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def open_mailbox() -> Any:
    """Start a mailbox on this process's node; returns the actor's handle. Ray must be connected."""
    return ray.remote(Mailbox).options(num_cpus=0, label_selector=this_node()).remote()
