"""Configurations in files.

    config = load_config("configs/quickstart.yaml", ["optim.max_steps=20", "seed=7"])   # a run file and overrides
    config = config_with({"model": {"name": "mine"}}, ["rollout.top_p=0.9"])            # sections, and overrides
    text = dump_config(config)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loading import apply_override, dump_yaml, nest, read_run_file
from .paths import resolve_files
from .run_config import DERIVED_DEFAULTS, GRPOConfig, known_keys
from .run_folders import anchor


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> GRPOConfig:
    """Read a run file (YAML) and apply overrides of the form `section.field=value` with a value in YAML.

    `lora.targets=[q_proj, v_proj]`, `data.eval=null` and flat names (`learning_rate=1e-4`) all work. The last override
    of a key takes precedence. The name of a run defaults to that of its file. Data, functions, models and adapters that
    exist only beside the run file are found there; those of a saved `config.yaml` where the run has found them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: invalid YAML, unknown keys or invalid values; one line per problem.
    """
    path = Path(path)
    keys = known_keys()
    values = nest(read_run_file(path, keys), keys)
    anchor(values, path)
    for override in overrides:
        apply_override(values, override, keys)
    logging = values.setdefault("logging", {})
    if logging.get("run_name") is None:
        logging["run_name"] = path.stem
    return resolve_files(GRPOConfig(**values), path.resolve().parent)


def config_with(sections: Mapping[str, Mapping[str, Any]], overrides: Sequence[str] = ()) -> GRPOConfig:
    """The configuration with the options of these sections, and overrides as in `load_config`.

    Raises:
        ValueError: unknown keys or invalid values; one line per problem.
    """
    values: dict[str, Any] = {name: dict(section) for name, section in sections.items()}
    for override in overrides:
        apply_override(values, override, known_keys())
    return GRPOConfig(**values)


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
