"""The adapters that a chat can switch between: the final one of a run and those of its checkpoints, or a single one.

    adapters = Adapters.of_run(Path("runs/mine"))
    adapters.listed()                               # [StoredAdapter(name="final", ...), StoredAdapter(name="20", step=20, ...)]
    weights = adapters.read(adapters.find("best"), engine.slots)        # from the disk once, then from memory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....rollout.slots import AdapterSlot
from ...checkpoint.state import ADAPTER
from ...checkpoint.store import checkpoint_folders, read_checkpoint, read_manifest, step_of
from ...common.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ...model.slot_weights import SlotWeights
from ...model.start import StartAdapter, read_start
from ...run.run_folder import ADAPTER_DIR, CHECKPOINTS

BASE, FINAL, ONLY = "base", "final", "adapter"

Identity = tuple[int, int, int]
"""Device, inode and time of a file of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """An adapter on disk.

    Attributes:
        name: as `find` takes it: `final`, `adapter`, or the steps of a checkpoint.
        folder: in PEFT's format.
        checkpoint: the folder of the checkpoint that it belongs to, whose checksums cover it; None: it is in none.
        reward: that ranks the checkpoint; None: not known.
        problem: why it cannot be read; None: nothing is known against it.
    """

    name: str
    folder: Path
    checkpoint: Path | None = None
    reward: float | None = None
    problem: str | None = None

    @property
    def step(self) -> int | None:
        """Of a checkpoint."""
        return None if self.checkpoint is None else step_of(self.checkpoint.name)

    @property
    def label(self) -> str:
        """What the answers are headed with."""
        return self.name if self.step is None else f"step {self.step}"


class Adapters:
    """See the module's docstring.

    Args:
        run: the folder whose checkpoints are listed; None: there are none.
        last: the adapter that is not in a checkpoint; None: there is none.
    """

    def __init__(self, run: Path | None, last: StoredAdapter | None) -> None:
        self._run, self._last = run, last
        self._loaded: dict[Identity | None, StartAdapter] = {}
        self._read: dict[Identity | None, SlotWeights] = {}

    @classmethod
    def of_run(cls, run: Path) -> Adapters:
        """Those of a run folder.

        Raises:
            ValueError: it has neither an adapter nor checkpoints.
        """
        folder = run / ADAPTER_DIR
        adapters = cls(run, StoredAdapter(name=FINAL, folder=folder) if is_adapter(folder) else None)
        if not adapters.listed():
            raise ValueError(f"no adapter in {run}: the run has saved none and no checkpoints, or they were removed")
        return adapters

    @classmethod
    def of_folder(cls, folder: Path) -> Adapters:
        """A single adapter in PEFT's format."""
        return cls(None, StoredAdapter(name=ONLY, folder=folder))

    @property
    def first(self) -> StoredAdapter:
        """The one to begin with: that which the run ended with, else the newest undamaged checkpoint.

        Raises:
            ValueError: all checkpoints are damaged, with the problem of the newest.
        """
        return self._last if self._last is not None else self._newest()

    def listed(self) -> list[StoredAdapter]:
        """All of them as they are on disk now, checkpoints in the order of their steps."""
        found = [] if self._last is None else [self._last]
        if self._run is not None:
            found += [_of_checkpoint(path) for path in reversed(checkpoint_folders(self._run / CHECKPOINTS))]
        return found

    def find(self, name: str) -> StoredAdapter:
        """The one of that name: `final`, `last`, `best`, or the number of steps.

        Raises:
            ValueError: there is none, with those that there are.
        """
        listed = self.listed()
        if name == "last":
            return self._newest()
        if name == "best":
            return _best(listed)
        wanted = name.lower().removeprefix("step").strip(" _-").lstrip("0") or name
        for one in listed:
            if one.name in (name, wanted):
                return one
        known = ", ".join([BASE, *(one.name for one in listed)])
        raise ValueError(f"no checkpoint {name!r}: there are {known}" + (", last and best" if self._run is not None else ""))

    def load(self, saved: StoredAdapter) -> None:
        """Read an adapter that `read` shall return, before there is an engine.

        Raises:
            ValueError: it is damaged or gone, or of an unsupported kind.
        """
        if saved.problem is not None:
            raise ValueError(saved.problem)
        identity = _identity(saved.folder)
        if identity is None:
            raise ValueError(f"the adapter in {saved.folder} is gone: a run keeps only some of its checkpoints")
        if identity in self._read or identity in self._loaded:
            return
        if saved.checkpoint is not None:
            read_checkpoint(saved.checkpoint, under=f"{ADAPTER}/")
        self._loaded[identity] = read_start(saved.folder)

    def read(self, saved: StoredAdapter, slots: Mapping[str, AdapterSlot]) -> SlotWeights:
        """Its weights, from memory if it was read before and has not been replaced.

        Raises:
            ValueError: see `load`; or it does not fit the engine.
        """
        self.load(saved)
        identity = _identity(saved.folder)
        if identity in self._loaded:
            self._read[identity] = SlotWeights.of(self._loaded.pop(identity), slots)
        return self._read[identity]

    def is_read(self, saved: StoredAdapter) -> bool:
        """Whether `read` finds its weights in memory."""
        return _identity(saved.folder) in self._read

    def _newest(self) -> StoredAdapter:
        checkpoints = [one for one in self.listed() if one.checkpoint is not None]
        intact = [one for one in checkpoints if one.problem is None]
        if not intact:
            raise ValueError(checkpoints[-1].problem or "" if checkpoints else "there are no checkpoints")
        return intact[-1]


def _identity(folder: Path) -> Identity | None:
    """Of the weights in a folder; None if they are gone."""
    for name in ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            status = (folder / name).stat()
            return status.st_dev, status.st_ino, status.st_mtime_ns
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter in PEFT's format."""
    return (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_WEIGHTS)


def _best(listed: list[StoredAdapter]) -> StoredAdapter:
    """The checkpoint with the highest reward; of equal ones, the newest."""
    rewards = {place: one.reward for place, one in enumerate(listed) if one.problem is None and one.reward is not None}
    if not rewards:
        raise ValueError("no checkpoint has a reward: `/checkpoint` lists them")
    return listed[max(rewards, key=lambda place: (rewards[place], place))]


def _of_checkpoint(path: Path) -> StoredAdapter:
    name, folder = str(step_of(path.name)), path / ADAPTER
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return StoredAdapter(name=name, folder=folder, checkpoint=path, problem=str(error))
    return StoredAdapter(name=name, folder=folder, checkpoint=path, reward=manifest["reward"])
