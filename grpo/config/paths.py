"""Files that a run file names: one that exists only beside the run file gets its path from the working directory.

    resolve_files(config, Path("configs"))      # data.train: train.jsonl  ->  configs/train.jsonl

It happens once, when a run file is loaded. Afterwards every relative path starts from the working directory, as in a
configuration made in Python, and nothing needs to know where the run file was.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...section import Section
from ..common.model_files import EMBEDDED

if TYPE_CHECKING:
    from .run_config import GRPOConfig

SectionT = TypeVar("SectionT", bound=Section)

DATA_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffixes of data files, and the builder of `datasets` for each."""


def resolve_files(config: GRPOConfig, folder: Path) -> GRPOConfig:
    """The configuration with resolved names of data, functions, models and adapters. `folder` is the run file's."""
    functions = [
        resolve(one, folder) if isinstance(one, str) else one.model_copy(update={"function": resolve(one.function, folder)})
        for one in config.rewards.functions
    ]
    return config.model_copy(
        update={
            "data": _resolved(config.data, ("train", "eval", "sampler"), folder),
            "algorithm": _resolved(config.algorithm, ("loss_type", "advantage_estimator", "group_filter"), folder),
            "rewards": config.rewards.model_copy(update={"functions": functions}),
            "model": _with_folders(config.model, ("name", "tokenizer"), folder),
            "lora": _with_folders(config.lora, ("start_from",), folder),
        }
    )


def _with_folders(section: SectionT, options: Sequence[str], folder: Path) -> SectionT:
    """The section with other values of the options that name a folder beside the run file, such as a model."""
    found: dict[str, str] = {}
    for option in options:
        name = getattr(section, option)
        if name is None or name.lower() in EMBEDDED or Path(name).expanduser().exists():
            continue
        if (folder / name).is_dir():
            path, here = (folder / name).resolve(), Path.cwd()
            found[option] = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return section.model_copy(update=found)


def _resolved(section: SectionT, options: Sequence[str], folder: Path) -> SectionT:
    """The section with other values of the options that name a file beside the run file. Unset options stay unset."""
    values = {option: getattr(section, option) for option in options}
    found = {option: _resolved_value(value, folder) for option, value in values.items()}
    return section.model_copy(update={option: value for option, value in found.items() if value != values[option]})


def _resolved_value(value: object, folder: Path) -> object:
    """A name, or every name of a mapping; anything else, such as a function, is unchanged."""
    if isinstance(value, dict):
        return {key: _resolved_value(one, folder) for key, one in value.items()}
    return resolve(value, folder) if isinstance(value, str) else value


def resolve(name: str, folder: Path) -> str:
    """`train.jsonl`, `reward.py:score` or `package.module:score` with a path if it exists in `folder` only; else unchanged."""
    location, colon, attribute = name.rpartition(":")
    if not colon:
        return _beside(name, folder) if Path(name).suffix in DATA_FORMATS else name
    if location.endswith(".py"):
        return f"{_beside(location, folder)}:{attribute}"
    top, *_ = parts = location.split(".")
    is_module = all(part.isidentifier() for part in parts)
    if not is_module or Path(top).is_dir() or Path(f"{top}.py").is_file() or find_spec(top) is not None:
        return name
    file = Path(*parts).with_suffix(".py")
    found = _beside(str(file), folder)
    return name if found == str(file) else f"{found}:{attribute}"


def _beside(name: str, folder: Path) -> str:
    path = Path(name).expanduser()
    if path.is_absolute() or path.is_file() or not (folder / path).is_file():
        return name
    found, here = (folder / path).resolve(), Path.cwd()
    return str(found.relative_to(here) if found.is_relative_to(here) else found)
