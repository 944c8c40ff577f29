"""A view that shows nothing, and a recorder that writes nothing: for all workers of a cluster but the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..display.terminal import SampleRow
from ..display.view_text import When
from .records import RunRecorder
from .reporting import Report


class SilentView:
    """A `terminal.View` that shows nothing."""

    def start(self) -> None: ...
    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None: ...
    def completions(self, step: int, rows: Sequence[SampleRow]) -> None: ...
    def evaluation(self, step: int, reward: float, when: When) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...
    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...


class SilentRecorder(RunRecorder):
    """A `RunRecorder` that owns no folder and writes nothing."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.moved_aside = None

    def report_to(self, reports: Sequence[Report]) -> None: ...
    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def add_seconds(self, phase: str, seconds: float) -> None: ...
    def evaluation(
        self, step: int, reward: float, *, when: When, metrics: Mapping[str, float] | None = None
    ) -> None: ...
    def reward_at(self, step: int, *, by_evaluation: bool) -> float | None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def sync(self) -> None: ...
    def summary(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def resume(self) -> bool:
        return True

    def completions(self, step: int, table: Mapping[str, Sequence], **columns: Any) -> Path:
        return self.output_dir

    def rows(self) -> list[dict[str, Any]]:
        return []

    def close(self, *, failed: bool = False) -> None: ...
