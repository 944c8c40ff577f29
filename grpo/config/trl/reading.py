"""What callbacks written for TRL read: the value of any of TRL's names, such as `args.metric_for_best_model`.

    read(config, "eval_strategy", given={})         # "steps", if the run evaluates while it trains

A name that is an option here has that option's value. Another one has the value that the script gave, else TRL's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .fields import ALIASES, ALL_NAMES
from .script import Value

if TYPE_CHECKING:
    from ..run_config import GRPOConfig

DERIVED: dict[str, Callable[[GRPOConfig], Value]] = {
    "metric_for_best_model": lambda config: "eval_reward",
    "greater_is_better": lambda config: True,
    "eval_strategy": lambda config: "steps" if config.logging.eval_steps else "no",
    "save_strategy": lambda config: "steps" if config.checkpoint.save_steps else "no",
    "logging_strategy": lambda config: "steps",
    "logging_steps": lambda config: 1,
    "eval_on_start": lambda config: config.logging.eval_before,
    "bf16": lambda config: config.model.dtype == "bfloat16",
    "fp16": lambda config: config.model.dtype == "float16",
    "vllm_importance_sampling_correction": lambda config: config.correction.mode != "none",
    "use_vllm": lambda config: config.rollout.engine == "vllm",
    "vllm_max_model_length": lambda config: config.rollout.max_model_length,
    "world_size": lambda config: config.cluster.workers,
}
"""Names that no single option has."""

BATCH: dict[str, Callable[[GRPOConfig], Value]] = {
    "per_device_train_batch_size": lambda config: config.completions_per_step // config.cluster.workers,
    "gradient_accumulation_steps": lambda config: 1,
    "steps_per_generation": lambda config: 1,
    "generation_batch_size": lambda config: config.completions_per_step,
}
"""A step in TRL's terms, if the script has not given it in these."""


def read(config: GRPOConfig, name: str, *, given: Mapping[str, Value]) -> Value:
    """The value of one of TRL's names.

    Raises:
        AttributeError: TRL has no such name.
    """
    name = ALIASES.get(name, name)
    derived = DERIVED if config.has_trl_batch else {**DERIVED, **BATCH}
    if name in derived:
        return derived[name](config)
    field = ALL_NAMES.get(name)
    if field is None:
        raise AttributeError(f"GRPOConfig has no option {name}")
    if field.to and not field.converts:
        value: Any = config
        for part in field.to[0].split("."):
            value = getattr(value, part)
        return value
    return given.get(name, field.default)
