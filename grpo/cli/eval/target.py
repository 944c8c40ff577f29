"""What `rankup eval` evaluates: a run or its checkpoint, what a run file starts from, an adapter, or a model.

    target = find_target("runs/quickstart", checkpoint="best")
    target.config_file, target.adapter          # of the run, and the adapter of its best checkpoint
    target = find_target("runs/quickstart/adapter")
    target.values                               # {"model": {"name": ...}, "lora": {"start_from": ...}}: it has no run file
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Any

from ...common.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDED, resolve_adapter
from ...run.records import CONFIG_FILE
from ...run.run_folder import ADAPTER_DIR, CHECKPOINTS

RUN_FILES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """See the module's docstring.

    Attributes:
        name: what is evaluated, in words.
        config_file: the run file, or the configuration that a run has saved; None: `values` are the configuration.
        values: options by section, if there is no run file.
        adapter: the saved adapter of the run that is evaluated; None: the policy that the configuration starts from.
        run: the run folder, for the results; None: there is none.
        label: of the results in the run folder.
    """

    name: str
    config_file: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    run: Path | None = None
    label: str = ""


def find_target(name: str, *, checkpoint: str | None = None, has_data: bool = False) -> Target:
    """What a name on the command line means.

    Args:
        checkpoint: `best`, `last` or a number of steps, of a run.
        has_data: whether evaluation data are given; an adapter or a model without a run has none of its own.

    Raises:
        ValueError, FileNotFoundError: there is no such thing, or no such checkpoint.
    """
    folder = Path(expanduser(name))
    if os.path.isfile(folder / CONFIG_FILE) and not os.path.isfile(folder / ADAPTER_CONFIG):
        return _of_run(folder, checkpoint)
    if checkpoint is not None:
        raise ValueError(f"--checkpoint is for a run folder, and {name} is none")
    if folder.suffix in RUN_FILES or os.path.isfile(folder):
        return Target(name=name, config_file=folder)
    is_known = os.path.isdir(folder) or name.lower() in EMBEDDED
    if not has_data:
        if not is_known:
            raise FileNotFoundError(f"run file not found: {name} (a model or an adapter of the Hub needs --data and --reward)")
        raise ValueError(
            f"{name} is neither a run folder nor a run file: to evaluate a model or an adapter, give its data and reward "
            "functions with --data and --reward"
        )
    adapter = _adapter_at(name, folder)
    if adapter is None:
        return Target(name=name, values={"model": {"name": name}})
    return Target(name=name, values=_values_of(name, adapter))


def _of_run(folder: Path, checkpoint: str | None) -> Target:
    """A run folder, or a folder `checkpoints/step_<N>` of one."""
    resolved = folder.resolve()
    is_checkpoint = resolved.parent.name == CHECKPOINTS
    if is_checkpoint and checkpoint is not None:
        raise ValueError(f"{folder} is a checkpoint already: leave out --checkpoint")
    run = resolved.parents[1] if is_checkpoint else folder
    found = folder if is_checkpoint or checkpoint is None else find_checkpoint(run, checkpoint)
    adapter = found / ADAPTER_DIR
    if not os.path.isfile(adapter / ADAPTER_WEIGHTS[0]):  # before an engine starts
        newest = _checkpoints(run)
        hint = "; --checkpoint last evaluates its newest checkpoint" if newest and found == folder else ""
        raise ValueError(f"no adapter in {adapter}: {folder} is not a run folder, or the run saved no adapter{hint}")
    label = ADAPTER_DIR if found == folder and not is_checkpoint else found.name
    return Target(name=str(adapter), config_file=found / CONFIG_FILE, adapter=adapter, run=run, label=label)


def find_checkpoint(run: Path, which: str) -> Path:
    """The folder of a run's checkpoint: `best` (by the reward that ranks them), `last`, or a number of steps.

    Raises:
        ValueError: there is none.
    """
    from ...checkpoint.store import NAME, read_manifest

    if which not in ("best", "last") and not which.isdecimal():
        raise ValueError(f"--checkpoint must be best, last or a number of steps (got {which})")
    found = {int(match[1]): path for path in _checkpoints(run) if (match := NAME.fullmatch(path.name))}
    if not found:
        raise ValueError(f"{run} has no checkpoints")
    if which == "last":
        return found[max(found)]
    if which.isdecimal():
        if int(which) not in found:
            raise ValueError(f"{run} has no checkpoint of step {which}: there are {', '.join(map(str, sorted(found)))}")
        return found[int(which)]
    rewards = {step: reward for step, path in found.items() if (reward := read_manifest(path)["reward"]) is not None}
    if not rewards:
        raise ValueError(f"no checkpoint of {run} has a known reward: there are {', '.join(map(str, sorted(found)))}")
    return found[max(rewards, key=lambda step: (rewards[step], step))]


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / CHECKPOINTS).glob("step_*") if path.is_dir()]


def _adapter_at(name: str, folder: Path) -> Path | None:
    """The folder of an adapter in PEFT's format; None if it is a model."""
    if os.path.isdir(folder):
        return folder if os.path.isfile(folder / ADAPTER_CONFIG) else None
    if name.lower() in EMBEDDED:
        return None
    try:
        return resolve_adapter(name)
    except ValueError:  # a model of the Hub, or nothing at all, which is an error when it is loaded
        return None


def _values_of(name: str, adapter: Path) -> dict[str, Any]:
    """The configuration of an adapter on the base model that its file names.

    Raises:
        ValueError: the file names none.
    """
    try:
        saved = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = saved.get("base_model_name_or_path"), saved.get("revision")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name}: its {ADAPTER_CONFIG} is damaged: {error}") from error
    model = {} if base is None else {"name": base}
    return {"model": model | ({"revision": revision} if revision else {}), "lora": {"start_from": name}}
