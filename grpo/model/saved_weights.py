"""A model's weights in its files, by the names that they have in the model.

    saved = saved_weights(model, files_of_weights(folder))
    saved.keys["model.language_model.norm.weight"]         # "language_model.model.norm.weight" in the files of Gemma 3
    for name, tensor in saved.read(names, "cpu"): ...

The published checkpoints of some models with a vision tower (Gemma 3, Mistral 3, Qwen2.5-VL) have names of earlier versions of
transformers, which renames them while it loads. So does `saved_weights`, for models with a tower; the weights of the tower are
left out. Of all other models names are those of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...rollout.model_classes import has_tower


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """See the module's docstring.

    Attributes:
        keys: names in the files, by names in the model.
        files: which file holds each, by names in the model.
    """

    keys: Mapping[str, str]
    files: Mapping[str, Path]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, names: Sequence[str], device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight, by its name in the model. On CPU it is the file itself, mapped into memory."""
        for name in names:
            yield name, next(read_weights({self.keys[name]: self.files[name]}, [self.keys[name]], device))[1]

    def ends(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the last row of a weight, [1, ...] each."""
        with safe_open(self.files[name], framework="pt") as file:
            rows = file.get_slice(self.keys[name])
            last = rows.get_shape()[0] - 1
            return rows[:1], rows[last:]


def saved_weights(model: PreTrainedModel, files: Mapping[str, Path]) -> SavedWeights:
    """The weights in the files of a model. `files`: by names in the files; `model` may be without values and towers."""
    if not has_tower(model.config):
        return SavedWeights({name: name for name in files}, files)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    in_model, keys = {name: tensor for name, tensor in model.state_dict().items()}, {}
    for key in files:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, in_model)
        if name in in_model and converted is None:  # converted: several weights become one, or one several
            keys[name] = key
    return SavedWeights(keys, {name: files[key] for name, key in keys.items()})


def read_weights(files: Mapping[str, Path], names: Sequence[str], device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight, by its name in the files. On CPU it is the file itself, mapped into memory."""
    for name in names:
        # Opened each time: pages mapped through one opening stay resident until all its tensors are freed.
        with safe_open(files[name], framework="pt", device=device) as file:
            yield name, file.get_tensor(name)
