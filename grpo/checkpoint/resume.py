"""Which checkpoint a run resumes from, and whether configuration, data, reward functions and their code are still the same.

    resumption = find_resumption(True, config, store, inputs=inputs, allow_changes=False)
    resumption.checkpoint.path, resumption.state.position.steps_done        # None: there is no checkpoint yet

If they differ, resuming is refused with the list of differences, unless the user allows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.log import logger
from ..config import GRPOConfig, dump_config
from ..config.loading import parse_yaml, read_run_file
from ..config.run_folders import RENAMED
from ..experience.user_functions import CODE
from ..run.records import CONFIG_FILE, read_summary
from .state import RunState, made_with, read_state
from .store import Checkpoint, CheckpointStore, read_checkpoint

Resume = bool | str | Path | None
"""True: from the newest complete checkpoint; a path: from that one; False, None: start from scratch (TRL's
`resume_from_checkpoint`)."""

HARMLESS_SECTIONS = ("logging.", "checkpoint.", "cluster.")
"""Options of these sections do not affect training, except those below. Nor do more steps, if no rate depends on them."""
HARMLESS_OPTIONS = ("rewards.max_steps_without_reward",)
TRAINING_OPTIONS = ("logging.eval_steps", "logging.eval_before", "cluster.workers")

ADAPTER_OPTIONS = ("lora.rank", "lora.alpha", "lora.rank_pattern", "lora.alpha_pattern", "lora.use_rslora")
"""They give the shapes and scales of the weights in a checkpoint, so no resumed run can change them."""

_ABSENT = "not set"


@dataclass(frozen=True, slots=True)
class Resumption:
    """The checkpoint that a run resumes from, and its plain data."""

    checkpoint: Checkpoint
    state: RunState


def find_resumption(
    source: Resume,
    config: GRPOConfig,
    store: CheckpointStore,
    *,
    inputs: Mapping[str, Any],
    allow_changes: bool,
) -> Resumption | None:
    """The checkpoint to resume from; None if `source` is false or there is none yet. Logs every change that it allows.

    Raises:
        ValueError: configuration, data or reward functions differ, with every difference; the checkpoint has more steps than
            `optim.max_steps`; or the selected checkpoint is damaged or has another format.
    """
    if not source:  # TRL's scripts hand None through
        return None
    checkpoint = store.newest_complete() if source is True else read_checkpoint(store.validate_belongs(Path(source)))
    if checkpoint is None:
        logger.info("no checkpoint in %s: starting from scratch", store.folder)
        return None
    if checkpoint.step > config.optim.max_steps:
        raise ValueError(
            f"the run in {config.logging.output_dir} has done {checkpoint.step} steps already, more than "
            f"optim.max_steps={config.optim.max_steps}: increase it, or use the adapter of an earlier checkpoint"
        )
    state = read_state(checkpoint.path)
    changes = list(config_changes(checkpoint.path, config))
    harmless = [change for change in changes if not change.affects_training]
    breaking = [change for change in changes if change.affects_training] + list(input_changes(state.inputs, inputs))
    _refuse_changes(checkpoint.path, breaking, allow_changes=allow_changes)
    for change in [*harmless, *breaking]:
        logger.info("changed since the checkpoint: %s", change)
    return Resumption(checkpoint, state)


def _refuse_changes(checkpoint: Path, changes: list[Change], *, allow_changes: bool) -> None:
    adapter = [change for change in changes if change.option.startswith(ADAPTER_OPTIONS)]
    if allow_changes and adapter:
        raise ValueError(
            f"cannot resume from {checkpoint}: its adapter has another rank or scale:\n{_listed(adapter)}\n"
            "Restore these options, or start from scratch without --resume"
        )
    if changes and not allow_changes:
        raise ValueError(
            f"cannot resume from {checkpoint}: the configuration, data or code differ:\n{_listed(changes)}\n"
            "Restore the old values, or accept the new ones with --allow-changes (allow_changes=True), or start from scratch "
            "without --resume. Options that affect memory or speed only change results by rounding errors"
        )


def _listed(changes: list[Change]) -> str:
    return "\n".join(f"  {change}" for change in changes)


def summary_of_finished_run(config: GRPOConfig, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of `summary.json` if the run in `output_dir` is this one and is finished; else None."""
    run_dir = config.logging.output_dir
    summary = read_summary(run_dir)
    if summary is None or summary["interrupted"] or summary["steps"] != config.optim.max_steps:
        return None
    changes = [*config_changes(run_dir, config), *input_changes(summary.get("inputs", {}), inputs)]
    return None if any(change.affects_training for change in changes) else summary


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between the run of a checkpoint and this one."""

    option: str
    before: Any
    now: Any
    affects_training: bool = True
    """Whether it can change the steps that are left, or those that were done."""

    def __str__(self) -> str:
        return f"{self.option}: {self.before} in the checkpoint, {self.now} now"


def config_changes(folder: Path, config: GRPOConfig) -> Iterator[Change]:
    """Options that differ from the configuration in the folder of a checkpoint or a run."""
    saved = {RENAMED.get(option, option): value for option, value in _flat(read_run_file(folder / CONFIG_FILE)).items()}
    before = _with_new_options(saved)
    now = _flat(parse_yaml(dump_config(config)))
    schedules = ("constant", "constant_with_warmup", "inverse_sqrt")  # they do not depend on the number of steps
    keeps_rates = config.optim.lr_scheduler_type in schedules and config.optim.warmup_ratio == 0
    for change in _changes(before, now):
        if change.option == "logging.working_dir":  # says only how the paths of the others are to be read
            continue
        is_harmless = change.option.startswith(HARMLESS_SECTIONS) and change.option not in TRAINING_OPTIONS
        is_harmless |= change.option in HARMLESS_OPTIONS or (change.option == "optim.max_steps" and keeps_rates)
        is_harmless |= change.option == "rollout.routed_experts" and "replay" not in (change.before, change.now)
        yield dataclasses.replace(change, affects_training=not is_harmless)


def _with_new_options(before: dict[str, Any]) -> dict[str, Any]:
    """Options that did not exist when the configuration was written had no effect: they have their defaults."""
    defaults = _flat(parse_yaml(dump_config(GRPOConfig())))
    return before | {
        option: default
        for option, default in defaults.items()
        if option not in before and not any(name.startswith(f"{option}.") for name in before)
    }


def input_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Data or reward functions that differ from those of the checkpoint, one line for each file of code."""
    if CODE not in before:  # a checkpoint of an earlier version
        now = {name: value for name, value in now.items() if name != CODE}
    yield from _changes(_flat(before), _flat(now))


def software_changes(state: RunState, device: str) -> Iterator[Change]:
    """Versions, device or threads that differ from those of the checkpoint: results may differ by rounding errors."""
    yield from _changes(state.made_with, made_with(device))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*before, *now]):
        a, b = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if a != b:
            yield Change(name, a, b)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted names. An empty one is kept, since it differs from one that is not set."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
