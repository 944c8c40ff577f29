"""Which checkpoint a run goes on from, and whether it is still the same run.

    resumption = find_resumption(True, config, store, inputs=inputs, allow_changes=False, say=view.note)
    resumption.checkpoint.path, resumption.state.position.steps_done        # None: there is none yet

A run that is taken up with another configuration, other data or other reward functions is another run from there on. It is
refused with the list of differences, unless the user allows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import GRPOConfig, dump_config
from ..config.loading import parse_yaml, read_run_file
from ..run.records import CONFIG_FILE, read_summary
from .state import RunState, made_with, read_state
from .store import Checkpoint, CheckpointStore, read_checkpoint

Resume = bool | str | Path | None
"""True: from the newest whole checkpoint; a path: from that one; False, None: not at all (TRL's `resume_from_checkpoint`)."""

WITHOUT_EFFECT = ("logging.", "checkpoint.", "cluster.")
"""Sections that decide what is shown and kept, and where a run lives, but for these of their options:"""
WITH_EFFECT = ("logging.eval_steps", "logging.eval_before", "cluster.workers")

_ABSENT = "not set"


@dataclass(frozen=True, slots=True)
class Resumption:
    """A checkpoint that the run goes on from, and what it says."""

    checkpoint: Checkpoint
    state: RunState


def find_resumption(
    source: Resume,
    config: GRPOConfig,
    store: CheckpointStore,
    *,
    inputs: Mapping[str, Any],
    allow_changes: bool,
    say: Callable[[str], None],
) -> Resumption | None:
    """The checkpoint to go on from; None where none is asked for or there is none yet.

    Raises:
        ValueError: the run was another one, with every difference; or the named checkpoint is damaged, or of another format.
    """
    if not source:  # TRL's scripts hand None through
        return None
    checkpoint = store.newest_whole(say) if source is True else read_checkpoint(store.own(Path(source)))
    if checkpoint is None:
        say(f"no checkpoint in {store.folder}: the run starts at its first step")
        return None
    if checkpoint.step > config.optim.max_steps:
        raise ValueError(
            f"the run in {config.logging.output_dir} has done {checkpoint.step} steps already, more than "
            f"optim.max_steps={config.optim.max_steps}: raise that, or take the adapter of an earlier checkpoint"
        )
    state = read_state(checkpoint.path)
    changes = list(config_changes(checkpoint.path, config))
    free = [change for change in changes if not change.has_effect]
    grave = [change for change in changes if change.has_effect] + list(input_changes(state.inputs, inputs))
    if grave and not allow_changes:
        lines = "\n".join(f"  {change}" for change in grave)
        raise ValueError(
            f"the run of {checkpoint.path} was made otherwise:\n{lines}\n"
            "Go back to that, or go on as it is now with --allow-changes (allow_changes=True), or start anew without --resume. "
            "After a change of what costs memory or time only, the run differs in its last bits"
        )
    for change in [*free, *grave]:
        say(f"changed since the checkpoint: {change}")
    return Resumption(checkpoint, state)


def summary_of_finished_run(config: GRPOConfig, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `summary.json` says if the run in `output_dir` is this one and has come to its end; else None."""
    run_dir = config.logging.output_dir
    summary = read_summary(run_dir)
    if summary is None or summary["interrupted"] or summary["steps"] != config.optim.max_steps:
        return None
    changes = [*config_changes(run_dir, config), *input_changes(summary.get("inputs", {}), inputs)]
    return None if any(change.has_effect for change in changes) else summary


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between the run of a checkpoint and this one."""

    name: str
    before: Any
    now: Any

    @property
    def has_effect(self) -> bool:
        """Whether it can change what is learned."""
        return not self.name.startswith(WITHOUT_EFFECT) or self.name in WITH_EFFECT

    def __str__(self) -> str:
        return f"{self.name}: {self.before} there, {self.now} here"


def config_changes(folder: Path, config: GRPOConfig) -> Iterator[Change]:
    """Options with another value than in the folder of a checkpoint or a run."""
    before = _flat(read_run_file(folder / CONFIG_FILE))
    now = _flat(parse_yaml(dump_config(config)))
    yield from _changes(before, now)


def input_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Data or reward functions that are others than in the checkpoint."""
    yield from _changes(_flat(before), _flat(now))


def software_changes(state: RunState, device: str) -> Iterator[Change]:
    """Versions and the like that are others than in the checkpoint: the last bits may differ."""
    yield from _changes(state.made_with, made_with(device))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*before, *now]):
        a, b = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if a != b:
            yield Change(name, a, b)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted names. An empty one stays: it differs from one that is not set."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
