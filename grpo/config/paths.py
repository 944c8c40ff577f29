"""Files that a run file names: one that exists only beside the run file gets its path from the working directory.

    resolve_files(config, Path("configs"))      # data.train: train.jsonl  ->  configs/train.jsonl

It happens once, when a run file is loaded. Afterwards every relative path starts from the working directory, as in a
configuration made in Python, and nothing needs to know where the run file was.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run_config import GRPOConfig

DATA_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffixes of data files, and the builder of `datasets` for each."""


def resolve_files(config: GRPOConfig, folder: Path) -> GRPOConfig:
    """The configuration with resolved names of data, reward functions and loss. `folder` is the run file's."""
    data, loss = config.data, config.algorithm.loss_type
    sources: dict[str, str | dict[str, str]] = {}
    if data.train:
        sources["train"] = resolve(data.train, folder)
    if isinstance(data.eval, dict):
        sources["eval"] = {name: resolve(source, folder) for name, source in data.eval.items()}
    elif data.eval:
        sources["eval"] = resolve(data.eval, folder)
    functions = [
        resolve(one, folder) if isinstance(one, str) else one.model_copy(update={"function": resolve(one.function, folder)})
        for one in config.rewards.functions
    ]
    return config.model_copy(
        update={
            "data": data.model_copy(update=sources),
            "algorithm": config.algorithm.model_copy(update={"loss_type": resolve(loss, folder)}),
            "rewards": config.rewards.model_copy(update={"functions": functions}),
        }
    )


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
