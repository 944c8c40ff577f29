"""TRL's argument `peft_config` as options of the section `lora`.

    options = lora_options(peft.LoraConfig(r=16, lora_alpha=32), structure)
    options             # {"rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"], "use_rslora": False, ...}
    without_effect(peft.LoraConfig(lora_dropout=0.1))        # ("peft_config.lora_dropout: ...",)
    check_agreement(config.lora, options)

`config/trl/peft_fields.py` has the table of all fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftType

from ..config import LoraConfig
from ..config.trl.peft_fields import PEFT_FIELDS
from .targets import Structure, targets_of

LoraOptions = dict[str, object]
"""Options of the section `lora` by their names."""

FIELD_OF = {field.to[0].removeprefix("lora."): name for name, field in reversed(PEFT_FIELDS.items()) if field.to}
"""PEFT's name of each option; of several, the first."""


def lora_options(peft_config: PeftConfig, structure: Callable[[], Structure]) -> LoraOptions:
    """The options that select and scale the same layers. Their values are checked when the configuration is made of them.

    Raises:
        TypeError: it is no `PeftConfig`.
        ValueError: another method than LoRA, or fields that are not supported; one line each.
    """
    config = checked(peft_config)
    if config.init_lora_weights is False:
        raise ValueError(
            "peft_config.init_lora_weights: False starts from a random update, which makes the first policy differ from the "
            "base model: leave it at True"
        )
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
        "use_rslora": config.use_rslora,
        "targets": targets_of(config, structure),
        "init_lora_weights": config.init_lora_weights,
    }


def checked(peft_config: PeftConfig, *, ignored: Collection[str] = ()) -> PeftLoraConfig:
    """The same config, without fields that are not supported, `ignored` ones aside.

    Raises:
        TypeError, ValueError: see `lora_options`.
    """
    name = type(peft_config).__name__
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig (got {name})")
    if not isinstance(peft_config, PeftLoraConfig) or peft_config.peft_type != PeftType.LORA:
        raise ValueError(f"peft_config: must be a peft.LoraConfig, the only method that is supported (got {name})")
    problems = []
    if peft_config.task_type not in (None, "CAUSAL_LM"):
        problems.append(f"peft_config.task_type: must be CAUSAL_LM (got {peft_config.task_type})")
    for field in dataclasses.fields(peft_config):
        value = getattr(peft_config, field.name)
        known = PEFT_FIELDS.get(field.name)
        is_refused = known is None or known.kind == "refused"
        if is_refused and field.name not in ignored and value and value != _default_of(field):
            note = "it is not in the version of PEFT that rankup knows" if known is None else known.note
            problems.append(f"peft_config.{field.name}: is not supported; {note}")
    if problems:
        raise ValueError("\n".join(problems))
    return peft_config


def without_effect(peft_config: PeftConfig) -> tuple[str, ...]:
    """A note for each field without effect of which the reader of a script would expect one."""
    return tuple(
        f"peft_config.{name}: no effect here; {field.note}"
        for name, field in PEFT_FIELDS.items()
        if field.is_reported and getattr(peft_config, name) != field.default
    )


def check_agreement(lora: LoraConfig, options: Mapping[str, object]) -> None:
    """Check that options which were set in the configuration too have the same values there.

    Raises:
        ValueError: one differs.
    """
    for name in lora.model_fields_set & options.keys():
        ours, theirs = getattr(lora, name), options[name]
        if name == "init_lora_weights":
            theirs = "default" if theirs is True else theirs
        if _sorted(ours) != _sorted(theirs):
            raise ValueError(
                f"peft_config.{FIELD_OF[name]}: is {theirs}, and the configuration sets lora.{name} to {ours}: keep one of them"
            )


def _sorted(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value


def _default_of(field: dataclasses.Field[object]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()
