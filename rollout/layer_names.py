"""The linear layers of a model by transformers' names, which are those of adapters in PEFT's format, and what vLLM calls them.

    widths = layer_widths("path/to/model")                          # {"model.layers.0.self_attn.q_proj": 4096, ...}
    name_in_vllm(vllm_model, "model.layers.0.self_attn.q_proj")     # gpt-oss: "model.layers.0.attn.q_proj"

vLLM renames modules of some models, and finds an adapter's layers in its file by the model's `hf_to_vllm_mapper`. So do these
functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig

from .model_classes import build_model

Slot = TypeVar("Slot")
SUFFIX = ".lora_A.weight"  # of a layer's entry in an adapter's file


@functools.lru_cache(maxsize=8)
def layer_widths(model_path: str) -> Mapping[str, int]:
    """Output widths of all linear layers and of the input embedding, by transformers' names. Takes no memory for weights."""
    with torch.device("meta"):
        model = build_model(AutoConfig.from_pretrained(model_path))
    embedding = model.get_input_embeddings()
    widths = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    embeddings = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return widths | {name: module.embedding_dim for name, module in embeddings if module is embedding}


def renames(vllm_model: nn.Module) -> bool:
    """Whether vLLM calls some modules of this model differently from transformers."""
    mapper = _mapper(vllm_model)
    return mapper is not None and any(getattr(mapper, field.name) for field in dataclasses.fields(mapper))


def name_in_vllm(vllm_model: nn.Module, name: str) -> str:
    """What vLLM calls a layer. Parts of packed layers keep their own names."""
    mapper = _mapper(vllm_model)
    mapped = None if mapper is None else mapper.map_name(f"{name}{SUFFIX}")
    return name if mapped is None else mapped.removesuffix(SUFFIX)


def widths_in_vllm(vllm_model: nn.Module, model_path: str) -> dict[str, int]:
    """`layer_widths` by vLLM's names."""
    return {name_in_vllm(vllm_model, name): width for name, width in layer_widths(model_path).items()}


def by_transformers_names(vllm_model: nn.Module, slots: Mapping[str, Slot], model_path: str) -> dict[str, Slot]:
    """What vLLM has by its own names of layers, by transformers' names; unchanged where transformers has no such layer."""
    if not renames(vllm_model):
        return dict(slots)
    names = {name_in_vllm(vllm_model, name): name for name in layer_widths(model_path)}
    return {names.get(name, name): slot for name, slot in slots.items()}


def weights_by_transformers_names(
    vllm_model: nn.Module, weights: Mapping[str, torch.Tensor], model_path: str
) -> dict[str, torch.Tensor]:
    """vLLM's weights by transformers' names, where vLLM renames some; unchanged where transformers has no such weight."""
    if not renames(vllm_model):
        return dict(weights)
    mapper = _mapper(vllm_model)
    names = {mapper.map_name(name): name for name in _weight_names(model_path)}
    return {names.get(name, name): weight for name, weight in weights.items()}


@functools.lru_cache(maxsize=8)
def _weight_names(model_path: str) -> tuple[str, ...]:
    """Names of all parameters, those of tied ones too."""
    with torch.device("meta"):
        model = build_model(AutoConfig.from_pretrained(model_path))
    return tuple(name for name, _ in model.named_parameters(remove_duplicate=False))


def _mapper(vllm_model: nn.Module) -> Any:
    """vLLM's `WeightsMapper` for names in adapters' files."""
    mapper = getattr(vllm_model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()
