"""The guards' decisions, and the kinds of snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .rules import Alarm

SnapshotKind = Literal["step", "evaluation"]
"""Which evidence showed the policy of a snapshot to be good: the rewards of a training step, or an evaluation."""


class SnapshotStore(Protocol):
    """Copies of adapter and optimizer state, one of each kind (`update/snapshots.py`)."""

    def take(self, kind: SnapshotKind, step: int) -> None:
        """Replace the snapshot of that kind by the current state, after `step` updates."""
        ...

    def restore(self, kind: SnapshotKind) -> int:
        """Write the snapshot back into adapter and optimizer; returns its step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision about a step's update, or after an evaluation. `Guards.apply` carries out the snapshots' part."""

    step: int = 0
    """Steps done when this was decided."""
    alarms: tuple[Alarm, ...] = ()
    skip: bool = False
    """Do not apply the update: the batch is unsuitable for one."""
    restore: SnapshotKind | None = None
    """Restore this snapshot in place of the update."""
    snapshot: SnapshotKind | None = None
    """Take this snapshot before the update: the policy that was measured is healthy."""
    stop: bool = False
    """Stop the run: updates were skipped for too long, or a snapshot was restored too often."""
    text: str = ""
    """The actions in one line; empty if there are none."""
    remark: str = ""
    """What is not judged from now on; empty if that has not changed."""

    @property
    def allows_update(self) -> bool:
        """Whether the gradients may be applied. Those of a policy that is rolled back may not."""
        return not self.skip and self.restore is None

    @property
    def stop_reason(self) -> str | None:
        """Why the run stops; None if it continues."""
        return self.text if self.stop else None

    @property
    def notes(self) -> list[str]:
        """Messages for the user, apart from `stop_reason`."""
        text = "" if self.stop else self.text
        return [*(alarm.text for alarm in self.alarms), *filter(None, (text, self.remark))]
