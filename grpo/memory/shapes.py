"""The shapes of a model's layers, and exact parameter counts of the base and of an adapter, from `config.json` alone.

    shape = read_shape("Qwen/Qwen2.5-7B-Instruct")          # of a hub id only config.json is fetched
    shape.parameters                                        # 7,615,616,512
    shape.parameters_per_rank("all-linear")                 # 2,523,136: an adapter of rank r has r times as many

transformers builds the model on torch's meta device, which allocates nothing, and everything is read off its layers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import first_line
from ..common.model_files import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
}
"""The sizes of a shape, and their names in a `config.json`."""

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer or the input embedding: its name in the model, its input and output width."""

    name: str
    d_in: int
    d_out: int
    has_bias: bool = False

    @property
    def role(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes and layers of a model.

    Attributes:
        model: on the meta device.
        layers, ..., vocabulary: the decoder's sizes, see `SIZES`.
        matrices: every linear layer and the input embedding.
        quantisable: parameters of linear layers other than the head, which is what NF4 compresses.
        measured_config: the `config.json` with which a training pass is measured: that of the model, or that of a Llama of its
            sizes if the activations of the model are a guess.
        notes: why prompts cannot be shared in training, and what is a guess.
    """

    model: PreTrainedModel
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    matrices: tuple[Matrix, ...]
    quantisable: int
    measured_config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """transformers' class."""
        return type(self.model).__name__

    @property
    def parameters(self) -> int:
        """Of the base, tied weights once."""
        return self.model.num_parameters()

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the input embedding's."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return embedding is not None and head is not None and embedding.weight is head.weight

    @property
    def biases(self) -> tuple[str, ...]:
        """Roles of the linear layers with a bias."""
        return tuple(dict.fromkeys(matrix.role for matrix in self.matrices if matrix.has_bias))

    def targeted(self, targets: str | Sequence[str]) -> list[Matrix]:
        """The layers that get an adapter: `targets` as in `lora.targets`.

        Raises:
            ValueError: a target fits no layer, or one that cannot be adapted.
        """
        from ..model.targets import find_targets

        found = find_targets(self.model, targets).modules
        return [matrix for matrix in self.matrices if matrix.name in found]

    def target_notes(self, targets: str | Sequence[str]) -> tuple[str, ...]:
        """What a preset of `lora.targets` leaves out of this model, and why."""
        from ..model.targets import find_targets

        return find_targets(self.model, targets).notes

    def parameters_per_rank(self, targets: str | Sequence[str]) -> int:
        """Sum of `d_in + d_out` over the targeted layers: parameters of an adapter of rank 1."""
        return sum(matrix.d_in + matrix.d_out for matrix in self.targeted(targets))

    def has_like_layers(self, targets: str | Sequence[str]) -> bool:
        """Whether every layer has adapters, the same ones."""
        found = Counter(re.sub(r"\.\d+\.", ".N.", matrix.name) for matrix in self.targeted(targets))
        in_layers = {count for name, count in found.items() if ".N." in name}
        return in_layers == {self.layers}


def read_shape(model: str) -> ModelShape:
    """The shapes of a model: an embedded name, a folder, or a Hub id, of which only `config.json` is fetched.

    Raises:
        ValueError: no such model, or a `config.json` that does not describe a language model that transformers knows.
    """
    folder = Path(resolve_model(model, config_only=True))
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from ...rollout.model_classes import auto_class, towers, without_towers

    try:
        config_keys = _read_keys(folder / "config.json")
        config = AutoConfig.from_pretrained(folder)
        names = config.get_text_config().attribute_map or {}  # names in some families, such as n_embd
        written = config_keys | config_keys.get("text_config", {})
        missing = [key for key in ("hidden_size", "num_hidden_layers") if key not in written and names.get(key) not in written]
        if missing:  # transformers would build a model of its class's default sizes
            raise ValueError(f"it lacks {', '.join(missing)}; take the one that the model was saved with")
        with torch.device("meta"):
            built = auto_class(config).from_config(config)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"model {model}: its config.json describes no model that can be planned: {reason}") from error
    left_out = sum(one.numel() for tower in towers(built).values() for one in tower.parameters())
    if not left_out:
        return _read_off(built, config_keys)
    shape = _read_off(without_towers(built), _text_keys(config_keys))
    note = f"its text part is trained and counted; its tower ({left_out / 1e6:.0f}M parameters) is not loaded"
    return dataclasses.replace(shape, notes=(note, *shape.notes))


def _text_keys(config_keys: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint with a tower says of its text model; nothing if there is no class for that alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    keys: dict[str, Any] = config_keys.get("text_config", {})
    return keys if keys.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else {}


def _read_keys(file: Path) -> dict[str, Any]:
    keys: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))  # a mapping, as `resolve_model` has seen
    if "model_type" not in keys:
        raise ValueError("it lacks model_type; take the one that the model was saved with")
    return keys


def _largest(config: PreTrainedConfig, key: str) -> int | None:
    """A size; that of the largest layer where layers differ, as the width of heads in Gemma 4."""
    layers = config.per_layer_config if config.is_heterogeneous and key in (config.per_layer_attributes or ()) else [config]
    found = [getattr(layer, key, None) for layer in layers]
    return max((size for size in found if size is not None), default=None)


def _read_off(model: PreTrainedModel, config_keys: dict[str, Any]) -> ModelShape:
    from torch import nn

    from ..model.shared_prompts import why_prompts_cannot_be_shared

    config = model.config.get_text_config()
    sizes: dict[str, Any] = {name: _largest(config, key) for name, key in SIZES.items()}
    sizes["intermediate"] = sizes["intermediate"] or 4 * sizes["hidden"]
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden"] // sizes["heads"]
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = [Matrix(name, one.in_features, one.out_features, one.bias is not None) for name, one in linear.items()]
    for name, module in model.named_modules():
        if module is model.get_input_embeddings() and isinstance(module, nn.Embedding):
            matrices.append(Matrix(name, module.num_embeddings, module.embedding_dim))
    plain_reason, unknown = why_prompts_cannot_be_shared(model), []
    if any(getattr(config, name, None) for name in EXPERTS):
        unknown.append("it has experts: their activations are counted as one MLP's")
    attention = [one for one in model.modules() if all(isinstance(getattr(one, r, None), nn.Linear) for r in ATTENTION_MODULES)]
    if len(attention) != sizes["layers"]:
        unknown.append("not every layer has q_proj, k_proj, v_proj and o_proj: its activations are a guess")
    like_llama = {"model_type": "llama", **{key: sizes[name] for name, key in SIZES.items()}}
    return ModelShape(
        model=model,
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        intermediate=sizes["intermediate"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        vocabulary=sizes["vocabulary"],
        matrices=tuple(matrices),
        quantisable=sum(one.weight.numel() for one in linear.values() if one is not model.get_output_embeddings()),
        measured_config=like_llama if unknown or "num_hidden_layers" not in config_keys else config_keys,
        notes=(*unknown, *([f"each prompt is computed once per completion ({plain_reason})"] if plain_reason else [])),
    )
