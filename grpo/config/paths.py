"""Files that a run file names: one that exists only beside the run file gets its path from the working directory.

    resolve_files(config, Path("configs"))      # data.train: train.jsonl  ->  configs/train.jsonl

It happens once, when a run file is loaded. Afterwards every relative path starts from the working directory, as in a
configuration made in Python, and nothing needs to know where the run file was.

Files are looked for with `os.path` and not with `Path`, whose tests raise OSError for a text that is too long for a name.
"""

from __future__ import annotations

import glob
import mimetypes
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...rewards.config import NameOrMapping
from ...section import Section
from ..common.model_files import EMBEDDED
from .data import EvalSet

if TYPE_CHECKING:
    from .run_config import GRPOConfig

SectionT = TypeVar("SectionT", bound=Section)
Resolver = Callable[[str, Path], str]

DATA_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".arrow": "arrow",
}
"""Suffixes of data files, in any case, and the format of each."""

ENVIRONMENT_PREFIXES = ("openenv:", "textarena:", "gymnasium:")
"""Beginnings of `rollout.environment` that name no file or module."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Suffixes that may follow."""


def split_suffix(name: str) -> tuple[str, str]:
    """The suffix of a file and that of its compression (empty if it has none), both in lower case: `.jsonl` and `.gz`."""
    path = Path(name)
    compression = path.suffix.lower()
    if compression not in COMPRESSIONS:
        return compression, ""
    return Path(path.stem).suffix.lower(), compression


def is_url(name: str) -> bool:
    """Whether a source is at a URL, such as `https://...` or `s3://...`."""
    return "://" in name


def is_pattern(name: str) -> bool:
    """Whether a name is a glob pattern and not a file or folder."""
    return glob.has_magic(name) and not is_url(name) and not os.path.exists(expanduser(name))


def names_files(name: str) -> bool:
    """Whether a source is a file, a folder, a pattern or a URL, rather than the id of a data set on the Hub or a function.

    A name that does not exist is one if it has a path's form or a file's suffix.
    """
    path = Path(expanduser(name))
    if is_url(name) or glob.has_magic(name) or os.path.exists(path):
        return True
    location, colon, attribute = name.rpartition(":")
    if colon and (location.endswith(".py") or attribute.isidentifier()):
        return False
    suffix, compression = split_suffix(name)
    is_file = suffix in DATA_FORMATS or bool(compression) or mimetypes.guess_type(name)[0] is not None
    has_form = name.startswith(("/", "./", "../", "~")) or name.endswith("/") or name.count("/") > 1
    return is_file or has_form


def resolve_files(config: GRPOConfig, folder: Path) -> GRPOConfig:
    """The configuration with resolved names of data, functions, models and adapters. `folder` is the run file's."""
    functions = _resolved_functions(config.rewards.functions, folder)
    of_sets = {name: _resolved_functions(of_set, folder) for name, of_set in config.rewards.eval_functions.items()}
    data = _resolved(_resolved(config.data, ("train", "eval"), folder, resolve_data), ("sampler",), folder)
    if data.chat_template is not None and is_template_file(data.chat_template):
        data = data.model_copy(update={"chat_template": _beside(data.chat_template, folder)})
    return config.model_copy(
        update={
            "data": data,
            "algorithm": _resolved(config.algorithm, ("loss_type", "advantage_estimator", "group_filter"), folder),
            "rewards": config.rewards.model_copy(update={"functions": functions, "eval_functions": of_sets}),
            "rollout": _resolved(config.rollout, ("tools", "environment"), folder),
            "model": _with_folders(config.model, ("name", "tokenizer"), folder),
            "lora": _with_folders(config.lora, ("start_from",), folder),
        }
    )


def _resolved_functions(functions: Sequence[NameOrMapping], folder: Path) -> list[NameOrMapping]:
    """Reward functions, by name or with options."""
    return [
        resolve(one, folder) if isinstance(one, str) else one.model_copy(update={"function": resolve(one.function, folder)})
        for one in functions
    ]


def _with_folders(section: SectionT, options: Sequence[str], folder: Path) -> SectionT:
    """The section with other values of the options that name a folder beside the run file, such as a model."""
    found: dict[str, str] = {}
    for option in options:
        name = getattr(section, option)
        if name is None or name.lower() in EMBEDDED or os.path.exists(expanduser(name)):
            continue
        if os.path.isdir(folder / name):
            found[option] = _path_from_here(folder / name)
    return section.model_copy(update=found)


def _resolved(section: SectionT, options: Sequence[str], folder: Path, how: Resolver | None = None) -> SectionT:
    """The section with other values of the options that name a file beside the run file. Unset options stay unset."""
    values = {option: getattr(section, option) for option in options}
    found = {option: _resolved_value(value, folder, how or resolve) for option, value in values.items()}
    return section.model_copy(update={option: value for option, value in found.items() if value != values[option]})


def _resolved_value(value: object, folder: Path, how: Resolver) -> object:
    """A name, or every name of a list or a mapping; of an evaluation set with options that of its source; anything else, such
    as a function, is unchanged."""
    if isinstance(value, EvalSet):
        return value.model_copy(update={"source": _resolved_value(value.source, folder, how)})
    if isinstance(value, dict):
        return {key: _resolved_value(one, folder, how) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved_value(one, folder, how) for one in value]
    return how(value, folder) if isinstance(value, str) else value


def resolve_data(name: str, folder: Path) -> str:
    """A data file, a folder, a pattern of files, or a function, with a path if it exists in `folder` only; else unchanged."""
    path = Path(expanduser(name))
    if is_url(name) or path.is_absolute() or os.path.exists(path):
        return name
    if os.path.exists(folder / path):
        return _path_from_here(folder / path)
    if glob.has_magic(name) and not glob.glob(name, recursive=True):
        pattern = f"{glob.escape(_path_from_here(folder))}/{name}"
        return pattern if glob.glob(pattern, recursive=True) else name
    return resolve(name, folder)


def resolve(name: str, folder: Path) -> str:
    """`reward.py:score` or `package.module:score` with a path if it exists in `folder` only; else unchanged."""
    location, colon, attribute = name.rpartition(":")
    if not colon or name.startswith(ENVIRONMENT_PREFIXES):
        return name
    if location.endswith(".py"):
        return f"{_beside(location, folder)}:{attribute}"
    top, *_ = parts = location.split(".")
    is_module = all(part.isidentifier() for part in parts)
    if not is_module or os.path.isdir(top) or os.path.isfile(f"{top}.py") or find_spec(top) is not None:
        return name
    file = Path(*parts).with_suffix(".py")
    found = _beside(str(file), folder)
    return name if found == str(file) else f"{found}:{attribute}"


def is_template_file(template: str) -> bool:
    """Whether `data.chat_template` names a file: a template has braces."""
    return "{" not in template


def _beside(name: str, folder: Path) -> str:
    path = Path(expanduser(name))
    if path.is_absolute() or os.path.isfile(path) or not os.path.isfile(folder / path):
        return name
    return _path_from_here(folder / path)


def _path_from_here(path: Path) -> str:
    """The path from the working directory if it is inside, else the absolute one."""
    found, here = path.resolve(), Path.cwd()
    return str(found.relative_to(here) if found.is_relative_to(here) else found)
