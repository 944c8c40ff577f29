"""Whether a model object is that of a local folder: the same weights, configuration and ends of completions.

    for found in local_copies("Qwen/Qwen2.5-0.5B"):      # downloads nothing
        if is_same_model(model, weights, found.folder, dtype=torch.bfloat16):
            found.name, found.revision                                  # as options of the configuration
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..common.model_files import hub_id, resolve_model
from ..common.weight_files import files_of_weights
from ..model.saved_weights import SavedWeights, saved_weights
from .weights import tied_names

WITHOUT_EFFECT = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "pad_token_id", "bos_token_id"}
    | {"eos_token_id", "output_attentions", "output_hidden_states", "return_dict"}
)
"""Keys of a model's configuration that do not change its function; `_ends` compares the tokens that end a completion."""


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """A folder on this machine, and the options `model.name` and `model.revision` that give it."""

    folder: Path
    name: str
    revision: str | None


def local_copies(name: str | None) -> Iterator[LocalCopy]:
    """The folder of this name, or the cached snapshots of a model on the Hub, that of its main branch first.

    Nothing is downloaded; there may be none.
    """
    if not name:
        return
    if hub_id(name) is None:
        try:
            yield LocalCopy(Path(resolve_model(name)), name, None)
        except ValueError:  # no such folder any more
            pass
        return
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    main = repository / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    snapshots = sorted(path for path in repository.glob("snapshots/*") if (path / "config.json").is_file())
    for folder in sorted(snapshots, key=lambda path: path.name != commit):
        yield LocalCopy(folder, name, folder.name)


def is_same_model(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], folder: Path, *, dtype: torch.dtype
) -> bool:
    """Whether a run that reads the folder in `dtype` has the same model. Reads weight by weight, up to the first difference.

    weights: `plain_weights(model)`.
    """
    saved = saved_weights(model, {name: path for name, path in files_of_weights(folder).items() if path.is_file()})
    needed = weights.keys() - tied_names(model, weights)
    if not needed <= saved.files.keys():
        return False
    theirs = AutoConfig.from_pretrained(folder)
    if comparable(theirs) != comparable(model.config) or _ends(folder, theirs) != _ends_of(model):
        return False
    if theirs.architectures not in (None, [type(model).__name__]):
        return False
    return different_weight(weights, saved, sorted(weights.keys() & saved.files.keys()), dtype=dtype) is None


def different_weight(
    weights: Mapping[str, torch.Tensor], files: SavedWeights, names: Sequence[str], *, dtype: torch.dtype
) -> str | None:
    """The first of `names` under which the files have another value in `dtype`; None if there is none."""
    for name, saved in files.read(names, "cpu"):
        ours = weights[name]
        to = dtype if ours.is_floating_point() else ours.dtype
        if saved.shape != ours.shape or not torch.equal(saved.to(to), ours.detach().cpu().to(to)):
            return name
    return None


def comparable(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a configuration determines the model's function."""
    return _without_effect(json.loads(config.to_json_string(use_diff=False)))


def _without_effect(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_effect(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in WITHOUT_EFFECT and not key.startswith("_")
    }


def _ends(folder: Path, config: PreTrainedConfig) -> set[int]:
    """Tokens that end a completion, by the files of a model."""
    try:
        return _ids(GenerationConfig.from_pretrained(folder).eos_token_id)
    except OSError:  # it has no such file
        return _ids(GenerationConfig.from_model_config(config).eos_token_id)


def _ends_of(model: PreTrainedModel) -> set[int]:
    generation = model.generation_config
    return _ids((GenerationConfig.from_model_config(model.config) if generation is None else generation).eos_token_id)


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
