"""Configurations in files.

    config = load_config("configs/quickstart.yaml", ["optim.max_steps=20", "seed=7"])   # a run file and overrides
    config = make_config({"model": {"name": "mine"}}, ["rollout.top_p=0.9"])            # sections, and overrides
    text = dump_config(config)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loading import apply_override, dump_yaml, nest, read_run_file
from .paths import resolve_files
from .run_config import DERIVED_DEFAULTS, GRPOConfig, known_keys
from .run_folders import anchor

Changes = Mapping[str, Mapping[str, Any]]
"""Values of options by section."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, changes: Changes | None = None) -> GRPOConfig:
    """Read a run file (YAML) and apply overrides of the form `section.field=value` with a value in YAML.

    `lora.targets=[q_proj, v_proj]`, `data.eval=null` and flat names (`learning_rate=1e-4`) all work. The last override
    of a key takes precedence. The name of a run defaults to that of its file. Data, functions, models and adapters that
    exist only beside the run file are found there; those of a saved `config.yaml` where the run has found them.

    changes: options that replace those of the file, before the overrides.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: invalid YAML, unknown keys or invalid values; one line per problem.
    """
    path = Path(path)
    keys = known_keys()
    values = nest(read_run_file(path, keys), keys)
    anchor(values, path)
    _apply(values, changes or {}, overrides)
    logging = values.setdefault("logging", {})
    if logging.get("run_name") is None:
        logging["run_name"] = path.stem
    return resolve_files(GRPOConfig(**values), path.resolve().parent)


def make_config(changes: Changes, overrides: Sequence[str] = ()) -> GRPOConfig:
    """The configuration with these options instead of the defaults, and with overrides as in `load_config`.

    Raises:
        ValueError: see `load_config`.
    """
    values: dict[str, Any] = {}
    _apply(values, changes, overrides)
    return GRPOConfig(**values)


def _apply(values: dict[str, Any], changes: Changes, overrides: Sequence[str]) -> None:
    """Set options in `values`, in place."""
    for section, options in changes.items():
        values[section] = {**(values.get(section) or {}), **options}
    for override in overrides:
        apply_override(values, override, known_keys())


def dump_config(config: GRPOConfig) -> str:
    """The complete configuration as YAML, including defaults; `load_config` reads it back to the same values.

    Options that depend on `algorithm.loss_type` or `correction.mode` are null unless they were set. A function that was passed
    in Python is its spec, or a text in angle brackets if it has none (`functions.py`).
    """
    values = config.model_dump(mode="json")
    # Derived defaults are not written: otherwise a copy of the file with another `loss_type` would keep these values.
    for section, names in DERIVED_DEFAULTS.items():
        set_by_user = getattr(config, section).model_fields_set
        values[section].update({name: None for name in names if name not in set_by_user})
    if config.optim.num_train_epochs is not None:
        values["optim"]["max_steps"] = None  # not known yet
    return dump_yaml(values)
