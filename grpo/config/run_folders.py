"""The configuration that a run has saved, read from another folder than the run was started in.

    anchor(values, Path("elsewhere/runs/mine/config.yaml"))     # data.train: rows.jsonl  ->  /home/me/project/rows.jsonl

A run's `config.yaml` names files relative to the working directory of the run, which it has in `logging.working_dir`. A project
that was moved or copied together with its runs is found by `logging.output_dir`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Any

from ..common.model_files import EMBEDDED
from .paths import ENVIRONMENT_PREFIXES

NAMES_OF_FILES = {
    "model": ("name", "tokenizer"),
    "lora": ("start_from",),
    "data": ("train", "eval", "sampler"),
    "algorithm": ("loss_type", "advantage_estimator", "group_filter"),
    "rewards": ("functions", "eval_functions"),
    "rollout": ("tools", "environment"),
}
"""Options that can name files or folders; `data.chat_template` is saved as its text."""

RENAMED = {"logging.num_generations_eval": "data.eval_samples"}
"""Options by the names that they had in runs of earlier versions."""


def anchor(values: dict[str, Any], file: Path) -> None:
    """Give names in `values`, read from a run's configuration file, the absolute paths that they had for the run, in place.

    Names of files in the working directory stay as they are, and so do those of other configuration files.
    """
    logging = values.get("logging") or {}
    started_in = logging.pop("working_dir", None)
    if started_in is None:
        return
    for old, new in RENAMED.items():
        section, _, option = old.partition(".")
        if option in (values.get(section) or {}):
            of_new, _, name = new.partition(".")
            values.setdefault(of_new, {}).setdefault(name, values[section].pop(option))
    folders = [*_moved(file, Path(logging.get("output_dir") or ".")), Path(started_in)]
    for section, options in NAMES_OF_FILES.items():
        found = values.get(section) or {}
        found.update({name: _anchored(found[name], folders) for name in options if name in found})


def function_of_run(function: str, functions: list[str]) -> str:
    """A reward function by the name that its file has in the run's functions, if it is not in the working directory.

    Raises:
        ValueError: several of them have this name.
    """
    location, _, name = function.rpartition(":")
    if location and not location.endswith(".py") and all(part.isidentifier() for part in location.split(".")):
        if _is_found(location.split(".")[0]):
            return function
        location = f"{location.replace('.', '/')}.py"
    if not location.endswith(".py") or os.path.isfile(expanduser(location)):
        return function
    found = list(dict.fromkeys(one for one in functions if f"/{one}".endswith(f"/{location}:{name}")))
    if len(found) > 1:
        raise ValueError(f"{function}: the run has {' and '.join(found)}; write more of the path")
    return found[0] if found else function


def _is_found(package: str) -> bool:
    return os.path.isdir(package) or os.path.isfile(f"{package}.py") or find_spec(package) is not None


def _moved(file: Path, output_dir: Path) -> list[Path]:
    """The working directory of the run that `output_dir` is relative to, by where the run folder is now."""
    parts = output_dir.parts
    for folder in (file.resolve().parent, *file.resolve().parents):
        if not output_dir.is_absolute() and ".." not in parts and folder.parts[-len(parts) :] == parts:
            return [Path(*folder.parts[: -len(parts)])]
    return []


def _anchored(value: Any, folders: list[Path]) -> Any:
    """A name, or all names of a list or a mapping; of a reward function or an evaluation set with options, its own name."""
    if isinstance(value, list):
        return [_anchored(one, folders) for one in value]
    if isinstance(value, Mapping):
        has_options = {"function", "kwargs"} <= value.keys() or {"source", "prompt_column"} <= value.keys()
        own = ("function", "source") if has_options else tuple(value)
        return {key: _anchored(one, folders) if key in own else one for key, one in value.items()}
    if not isinstance(value, str):
        return value
    here, found = Path.cwd(), [(folder, path) for folder in folders if (path := _in(folder, value))]
    return found[0][1] if found and found[0][0] != here else value


def _in(folder: Path, name: str) -> str | None:
    """The name with its absolute path if it is a file, folder, pattern or function in `folder`; else None."""
    is_other = "://" in name or name.startswith(ENVIRONMENT_PREFIXES) or name.lower() in EMBEDDED
    if is_other or Path(expanduser(name)).is_absolute():
        return None
    location, colon, attribute = name.rpartition(":")
    if colon and location.endswith(".py"):
        return f"{folder / location}:{attribute}" if os.path.isfile(folder / location) else None
    parts = location.split(".")
    if colon and all(part.isidentifier() for part in parts):
        path = folder.joinpath(*parts).with_suffix(".py")
        return f"{path}:{attribute}" if os.path.isfile(path) and not _is_installed(parts[0], folder) else None
    if os.path.exists(folder / name):
        return str(folder / name)
    pattern = f"{glob.escape(str(folder))}/{name}"
    return pattern if glob.has_magic(name) and glob.glob(pattern, recursive=True) else None


def _is_installed(package: str, folder: Path) -> bool:
    """Whether an import finds a package elsewhere than in this folder or the working directory."""
    spec = find_spec(package)
    if spec is None:
        return False
    places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    return not {Path(place).resolve().parent for place in places} & {folder.resolve(), Path.cwd()}
