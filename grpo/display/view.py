"""What shows a run: in a terminal, as lines, or in a notebook.

    with make_view(max_steps=80, run_name="quickstart", output_dir=Path("runs/quickstart")) as view:
        view.stage("starting the engine")
        view.evaluation(0, {"eval_reward": 0.11}, "before")
        view.step(1, metrics, {"rollout": 3.1, "train": 2.1})
        view.completions(1, [SampleRow(prompt, completion, reward, advantage)])    # an episode: its messages
        view.finish(summary)

`metrics` and `summary` are those of `RunRecorder`.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

from .view_text import Prompt, When


class SampleRow(NamedTuple):
    """A completion to show; that of an episode is its messages. None: no reward, no advantage."""

    prompt: Prompt
    completion: Prompt
    reward: float | None
    advantage: float | None = None


class View(Protocol):
    """What shows a run. `note` may come from any thread; `step` counts from 1, phases and times are in seconds."""

    def stage(self, text: str) -> None:
        """Show the current activity outside of steps ("starting the engine", "evaluating")."""

    def note(self, text: str) -> None:
        """Show a note that stays readable after the run."""

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The run was resumed after `step` steps; `rows` are the lines of `metrics.jsonl` up to there."""

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None: ...
    def completions(self, step: int, rows: Sequence[SampleRow]) -> None: ...
    def evaluation(self, step: int, metrics: Mapping[str, float], when: When) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None:
        """Show the summary and the output folder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        return None


class Pace:
    """Steps done and the remaining time, estimated from the mean duration of the last 20 steps."""

    def __init__(self, max_steps: int) -> None:
        self.steps_done = 0
        self._max_steps = max_steps
        self._recent: deque[float] = deque(maxlen=20)
        self._end: float | None = None

    def step(self, step: int, seconds: float) -> None:
        self.steps_done = step
        self._recent.append(seconds)
        mean = sum(self._recent) / len(self._recent)
        self._end = time.monotonic() + mean * (self._max_steps - step)

    def left(self) -> float | None:
        """Estimated remaining seconds; None before the first step."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())
