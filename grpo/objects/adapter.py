"""The adapter of a `peft.PeftModel`, as a folder in PEFT's format that training starts from.

    name = adapter_name(peft_model)                                     # refuses what training cannot start from
    folder = save_adapter(peft_model, name, base="path/to/model")       # lora.start_from
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..model.targets import shortest
from .cache import Digest, cached_folder, new_folder
from .peft_config import checked
from .weights import plain_weights

OF_THE_START = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
"""Fields that only say how the adapter was initialised: it has its weights, and the base model those that it is used with."""


def base_model_of(model: PeftModel) -> PreTrainedModel:
    """The wrapped model, with the adapters' layers in it.

    Raises:
        ValueError: it is no model of transformers.
    """
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"model: the base of the PeftModel is a {type(base).__name__}, not a model of transformers")
    return base


def adapter_name(model: PeftModel) -> str:
    """The active adapter, which training starts from.

    Raises:
        ValueError: none or several are active; it is not LoRA, or has parts that are not supported; it is merged or disabled;
            or its scale was changed.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"model: one adapter must be active (active: {', '.join(active) or 'none'}): call set_adapter")
    (name,) = active
    config = checked(model.peft_config[name], ignored=OF_THE_START)
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError("model: an adapter has modules_to_save or trainable tokens, which are not supported: delete it")
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        raise ValueError("model: an adapter is merged into the base weights: call unmerge_adapter")
    for layer_name, layer in _layers(model, name):
        if layer.disable_adapters:
            raise ValueError("model: its adapter is disabled: call enable_adapter_layers")
        scale = layer.lora_alpha[name] / (math.sqrt(layer.r[name]) if config.use_rslora else layer.r[name])
        if not math.isclose(layer.scaling[name], scale):
            raise ValueError(
                f"model: the adapter's scale of {layer_name} is {layer.scaling[name]:g}, not alpha / rank, which is {scale:g}: "
                "set lora_alpha accordingly"
            )
    return name


def save_adapter(model: PeftModel, name: str, *, base: str) -> Path:
    """The adapter's folder in the cache, written if it is not there. `base`: the name of the base model.

    Its configuration has the same meaning in fewer words: target_modules alone selects the layers, and there is no dropout.
    """
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    config = _config(model, name, base)
    digest = Digest()
    digest.add("config", json.dumps(config.to_dict(), sort_keys=True, default=sorted).encode())
    for key in sorted(weights):
        digest.add_tensor(key, weights[key])
    folder = cached_folder("adapters", Path(base).name, digest)
    with new_folder(folder) as partial:
        if partial is not None:
            config.save_pretrained(str(partial))
            save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _config(model: PeftModel, name: str, base: str) -> LoraConfig:
    config = copy.deepcopy(cast(LoraConfig, model.peft_config[name]))
    modules = {weight.rpartition(".")[0] for weight in plain_weights(base_model_of(model))}
    config.target_modules = shortest([layer_name for layer_name, _ in _layers(model, name)], modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.lora_dropout = 0.0
    config.init_lora_weights = True
    config.loftq_config, config.eva_config, config.corda_config, config.lora_ga_config = {}, None, None, None
    config.base_model_name_or_path, config.revision, config.auto_mapping = base, None, None
    config.inference_mode = False
    return config


def _layers(model: PeftModel, name: str) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that the adapter is in, by their names in the base model."""
    for layer_name, layer in base_model_of(model).named_modules():
        if isinstance(layer, LoraLayer) and name in layer.r:
            yield layer_name, layer
