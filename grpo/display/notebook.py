"""The output of a run in a notebook: one HTML output that is updated in place, and stays in the saved notebook.

It needs nothing of the front end but `display` and `update_display` (Jupyter, VS Code, Colab). An update follows the last one
after half a second at the earliest, and after a hundred times as long as that one took.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .run_html import RunPicture, run_html, run_text
from .view import Pace, SampleRow, View
from .view_text import When, duration, harmless, step_seconds, summary_text

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

MIN_SECONDS = 0.5
"""Between two updates."""

MAX_SHARE = 0.01
"""Of the time, spent on updates."""


class NotebookView(View):
    """See the module's docstring. Notes may come from any thread, and a late update comes from a timer's."""

    def __init__(self, *, max_steps: int, run_name: str, output_dir: Path | None = None) -> None:
        self._max_steps = max_steps
        self._run_name = run_name
        self._output_dir = output_dir
        self._lock = threading.RLock()
        self._handle: DisplayHandle | None = None
        self._timer: threading.Timer | None = None
        self._next_update = 0.0
        self._forget_run()

    def _forget_run(self) -> None:
        """What an earlier run of the same trainer has shown."""
        self._started = time.monotonic()
        self._pace = Pace(self._max_steps)
        self._status = "starting"
        self._has_ended = False
        self._rows: list[Mapping[str, Any]] = []
        self._samples_step, self._samples = 0, list[SampleRow]()
        self._notes: list[str] = []
        self._lines: list[str] = []

    def stage(self, text: str) -> None:
        self._status = text
        if self._handle is None:  # data is read before there is a run
            print(f"{harmless(text)} ...")
        self._update()

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._update()

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._pace.steps_done = step
        self._rows = list(rows)
        self.note(f"resuming after step {step}")

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        self._pace.step(step, step_seconds(seconds_by_phase))
        self._status = "training"
        self._rows.append({"step": step, **metrics})
        self._update()

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._samples_step, self._samples = step, list(rows)
        self._update()

    def evaluation(self, step: int, metrics: Mapping[str, float], when: When) -> None:
        row = {"step": step, **metrics}
        # The last one of training may be that after training too: it is one point and one column.
        if not (when == "after" and self._rows and _are_equal(self._rows[-1], row)):
            self._rows.append(row)
        self._status = "finishing" if when == "after" else "training"
        self._update()

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._status = "stopped" if summary.get("interrupted") else "done"
        self._has_ended = True
        seconds = time.monotonic() - self._started
        self._lines = summary_text(summary, wall_seconds=seconds, output_dir=self._output_dir).splitlines()
        self._update()

    def __enter__(self) -> Self:
        from IPython.display import display

        with self._lock:
            self._forget_run()
            self._handle = display(self._bundle(), raw=True, display_id=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._status = "interrupted" if issubclass(kind, KeyboardInterrupt | SystemExit) else "stopped by an error"
        self._has_ended = True
        with self._lock:
            self._draw()

    def picture(self) -> RunPicture:
        """What is shown now."""
        elapsed, left = duration(time.monotonic() - self._started), self._pace.left()
        return RunPicture(
            run_name=self._run_name,
            status=self._status,
            steps_done=self._pace.steps_done,
            max_steps=self._max_steps,
            rows=self._rows,
            times="" if self._has_ended else elapsed if left is None else f"{elapsed}, ETA {duration(left)}",
            samples_step=self._samples_step,
            samples=self._samples,
            notes=self._notes,
            lines=self._lines,
        )

    def _bundle(self) -> dict[str, str]:
        """By media type; text for what shows no HTML."""
        picture = self.picture()
        return {"text/html": run_html(picture), "text/plain": run_text(picture)}

    def _update(self) -> None:
        """Show the changes, now or as soon as it is time for an update."""
        with self._lock:
            wait = self._next_update - time.monotonic()
            if wait <= 0:
                self._draw()
            elif self._timer is None and self._handle is not None:
                self._timer = threading.Timer(wait, self._update_late)
                self._timer.daemon = True
                self._timer.start()

    def _update_late(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():
                self._draw()

    def _draw(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._handle is None:
            return
        started = time.monotonic()
        self._handle.update(self._bundle(), raw=True)
        now = time.monotonic()
        self._next_update = now + max(MIN_SECONDS, (now - started) / MAX_SHARE)


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Also where both have NaN."""
    return one.keys() == other.keys() and all(
        one[name] == value or (one[name] != one[name] and value != value) for name, value in other.items()
    )
