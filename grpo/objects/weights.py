"""The weights of a model object: by the names that its files have, each once, without those of an adapter.

    weights = plain_weights(model)              # views: nothing is copied
    unique = without_ties(model, weights)       # no lm_head.weight if it is the embedding
    run_dtype(weights, config.model)            # "bfloat16", and a note if weights are rounded to it
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..config import ModelConfig

Weights = dict[str, torch.Tensor]

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
SUPPORTED = "dtype=torch.bfloat16, torch.float16 or torch.float32"


def plain_weights(model: PreTrainedModel) -> Weights:
    """The model's state dict with the names that it had before PEFT wrapped layers, without the adapters' weights."""
    weights: Weights = dict(model.state_dict())
    for layer in wrapped_layers(model):
        base = f"{layer}.base_layer."
        for name in [name for name in weights if name.startswith(f"{layer}.")]:
            tensor = weights.pop(name)
            if name.startswith(base):
                weights[f"{layer}.{name.removeprefix(base)}"] = tensor
    return weights


def wrapped_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that PEFT has put an adapter in."""
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def tied_names(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of weights that are another one's, as the model's configuration says and as they are."""
    ties: dict[str, str] = model.all_tied_weights_keys
    return {name for name, source in ties.items() if name in weights and _equal(weights[name], weights.get(source))}


def without_ties(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Weights:
    """The weights to save: all but tied ones. Those that share memory for another reason are copied."""
    tied = tied_names(model, weights)
    unique: Weights = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        if name not in tied:
            unique[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    return unique


def run_dtype(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> tuple[str, tuple[str, ...]]:
    """The value of `model.dtype`: the one that is set, else that of the weights; and a note if they differ.

    Raises:
        ValueError: the weights have a dtype that training does not support, or several.
    """
    found = sorted({tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}, key=str)
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in found)
    if len(found) != 1:
        raise ValueError(f"model: has weights in {names}: cast them to one dtype, as in model.to(torch.bfloat16)")
    if found[0] not in DTYPES:
        raise ValueError(f"model: {names} weights are not supported: load it with {SUPPORTED}")
    if "dtype" not in config.model_fields_set or config.dtype == names:
        return names, ()
    return config.dtype, (f"model: its weights are in {names}, and training uses them in {config.dtype} (model.dtype)",)


def _equal(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or tensor.shape != other.shape:
        return False
    return tensor.data_ptr() == other.data_ptr() or torch.equal(tensor, other)
