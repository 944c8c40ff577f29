"""The class of transformers that a checkpoint is trained as, and the model without its towers.

    config = AutoConfig.from_pretrained("path/to/model")
    model = build_model(config)              # on the device of the context, with random weights
    has_tower(config)                        # whether the checkpoint has a vision tower beside the text model

A checkpoint with a vision tower is trained as the complete class, that of `AutoModelForImageTextToText`: stock PEFT loads the
saved adapter on that class, and vLLM on the checkpoint. The towers, and what connects them to the text model, are replaced by
None before any weight is read (of Gemma 4 afterwards: see `base_model.py`): text does not pass through them.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

TRAINED_WITH_TOWER = frozenset({"gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl"})
"""Kinds of checkpoints (`model_type`) whose text part is trained: `tests/support/families.py` has one of each."""


PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
"""Fields of configurations: tokens in whose places the output of a tower is put."""


def has_tower(config: PretrainedConfig) -> bool:
    """Whether a checkpoint has a vision or audio tower beside its text model."""
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    return config.model_type in kinds and config.get_text_config() is not config


def check_class(config: PretrainedConfig) -> None:
    """Whether the text part of such a checkpoint can be trained.

    Raises:
        ValueError: it has a tower and is of no kind of which that is known.
    """
    if has_tower(config) and config.model_type not in TRAINED_WITH_TOWER:
        known = ", ".join(sorted(TRAINED_WITH_TOWER))
        raise ValueError(
            f"a checkpoint of type {config.model_type} has a vision or audio tower, and its text part cannot be trained yet: "
            f"take one that has the text model alone, or one of {known}"
        )


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class of transformers that loads the checkpoint with its own names of layers.

    Raises:
        ValueError: see `check_class`.
    """
    check_class(config)
    return AutoModelForImageTextToText if has_tower(config) else AutoModelForCausalLM


def build_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A new model without towers. `options`: of `from_config`.

    Raises:
        ValueError: see `check_class`.
    """
    return without_towers(cast(PreTrainedModel, auto_class(config).from_config(config, **options)))


def without_towers(model: PreTrainedModel) -> PreTrainedModel:
    """Remove what is not the text model, in place; returns the model.

    The placeholder of an image becomes a token like others, as in vLLM: Gemma 4 would compute another one in its place.
    """
    for name in towers(model):
        setattr(model.base_model, name, None)
    for name in PLACEHOLDERS:
        if has_tower(model.config) and hasattr(model.config, name):
            setattr(model.config, name, -1)
    return model


def towers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What is not the text model: the towers, and what connects them to it; by name in `model.base_model`."""
    if not has_tower(model.config):
        return {}
    decoder = model.get_decoder()
    return {name: module for name, module in model.base_model.named_children() if module is not decoder}
