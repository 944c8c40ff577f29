"""Which modules a `peft.LoraConfig` adapts, as the option `lora.targets`.

    targets_of(LoraConfig(target_modules={"v_proj", "q_proj"}), structure)                  # ["q_proj", "v_proj"]
    targets_of(LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]), structure)
    # "model\\.layers\\.(0|1)\\.self_attn\\.q_proj"
    structure_of(model), structure_of_files("path/to/model")                                # names of modules, no weights

A selection that names alone cannot express becomes a regular expression for exactly the modules that PEFT would adapt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...rollout.model_classes import build_model, towers
from ..config.lora import TARGET_PRESETS
from ..model.targets import shortest

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Structure:
    """Names of a model's modules, and which of them PEFT's `all-linear` adapts: the linear ones except the head."""

    model_type: str
    modules: tuple[str, ...]
    linear: tuple[str, ...]


def structure_of(model: PreTrainedModel) -> Structure:
    """That of a model, which has no adapter, without its towers: they stay frozen."""
    head = model.get_output_embeddings()
    of_towers = tuple(f"{model.base_model_prefix}.{name}" for name in towers(model))
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(of_towers)}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    return Structure(model.config.model_type, tuple(modules), tuple(linear))


def structure_of_files(model_path: str) -> Structure:
    """That of the model in a folder, from its config.json."""
    with torch.device("meta"):
        return structure_of(build_model(AutoConfig.from_pretrained(model_path)))


def targets_of(config: LoraConfig, structure: Callable[[], Structure]) -> str | list[str]:
    """The value of `lora.targets` that selects the same modules; `structure` is called only if it is needed.

    Raises:
        ValueError: PEFT has no default for this type of model, no module is selected, or the text is no regular expression.
    """
    given = config.target_modules
    is_shorthand = isinstance(given, str) and given.lower() == ALL_LINEAR
    if given is None:
        given = _default_of(structure().model_type)
    if config.exclude_modules or config.layers_to_transform not in (None, []):
        selected = _selected(config, given, structure(), is_shorthand=is_shorthand)
    elif is_shorthand:
        return ALL_LINEAR
    elif isinstance(given, str):
        if given in TARGET_PRESETS:  # a preset here, a regular expression in PEFT
            raise ValueError(f"peft_config.target_modules: no module is called {given!r}; name modules in a list")
        return given
    else:
        return sorted(given)
    if not selected:
        raise ValueError("peft_config.target_modules: exclude_modules and layers_to_transform leave no module of the model")
    return ALL_LINEAR if set(selected) == set(structure().linear) else shortest(selected, structure().modules)


def _default_of(model_type: str) -> str | list[str]:
    defaults: dict[str, str | list[str]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if model_type not in defaults:
        raise ValueError(f"peft_config.target_modules: PEFT has no default for models of type {model_type}: set it")
    return defaults[model_type]


def _selected(
    config: LoraConfig, given: str | Collection[str], structure: Structure, *, is_shorthand: bool
) -> list[str]:
    """The modules that PEFT selects among those of the model."""
    options = LoraConfig(
        target_modules=list(structure.linear) if is_shorthand else given if isinstance(given, str) else list(given),
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    found = [(name, check_target_module_exists(options, name)) for name in structure.modules]
    return [name for name, is_target in found if is_target]
