"""The shapes of a model's layers, and exact parameter counts of the base and of an adapter, from `config.json` alone.

    shape = read_shape("Qwen/Qwen2.5-7B-Instruct")          # of a hub id only config.json is fetched
    shape.parameters                                        # 7,615,616,512
    shape.parameters_per_rank("all-linear")                 # 2,523,136: an adapter of rank r has r times as many

The model is built by transformers on torch's meta device, which allocates nothing, and its layers are read off. A formula for
each family would need neither torch nor transformers, but would be one more thing to get wrong for every family (biases, norms
on queries and keys, tied heads, experts, towers for images); built, an 8B model takes about a second, once both are imported.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.log import log_to
from ...common.model_files import EMBEDDED, resolve_model
from ...config.lora import TARGET_PRESETS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Without these in config.json transformers would count another model than is meant: its class's defaults.
NEEDED_KEYS = ("model_type", "hidden_size", "num_hidden_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer or the input embedding: its name in the model, what goes in and what comes out."""

    name: str
    d_in: int
    d_out: int

    @property
    def role(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The module that it is part of, such as `model.layers.0.mlp`."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model consists of.

    Attributes:
        architecture: transformers' class.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: the decoder's sizes; `intermediate` is the MLP's.
        tied: whether the head's weight is the input embedding's.
        biases: roles of the linear layers with a bias.
        parameters: of the base, tied weights once.
        quantisable: parameters of linear layers other than the head, which is what NF4 compresses.
        matrices: every linear layer and the input embedding.
        norm_width: elements that the norms within the layers normalise for a token, all layers together.
        norm_rows: numbers that they keep for a token besides, one a normalised vector.
        plain_reason: why prompts cannot be shared in training, None where they can.
        unknown: what of the model the memory budget does not know, in words.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    biases: tuple[str, ...]
    parameters: int
    quantisable: int
    matrices: tuple[Matrix, ...]
    norm_width: int
    norm_rows: int
    plain_reason: str | None = None
    unknown: tuple[str, ...] = ()

    def targeted(self, targets: str | Sequence[str]) -> list[Matrix]:
        """The layers that get an adapter: `targets` as in `lora.targets`.

        Raises:
            ValueError: a target fits no layer that can be adapted.
        """
        if isinstance(targets, str) and targets not in TARGET_PRESETS:
            found = [matrix for matrix in self.matrices if re.fullmatch(targets, matrix.name)]
            missing = [] if found else [targets]
        else:
            names = TARGET_PRESETS[targets] if isinstance(targets, str) else targets
            found = [m for m in self.matrices if any(f".{m.name}".endswith(f".{name}") for name in names)]
            missing = [n for n in names if not any(f".{m.name}".endswith(f".{n}") for m in found)]
        if missing:
            roles = ", ".join(dict.fromkeys(matrix.role for matrix in self.matrices))
            raise ValueError(
                f"lora.targets: {self.architecture} has no linear layer {missing[0]}; name some of {roles}, as in "
                "--targets q_proj,v_proj"
            )
        return found

    def parameters_per_rank(self, targets: str | Sequence[str]) -> int:
        """Sum of `d_in + d_out` over the targeted layers: parameters of an adapter of rank 1."""
        return sum(matrix.d_in + matrix.d_out for matrix in self.targeted(targets))


def read_shape(model: str, *, revision: str | None = None, say: Callable[[str], None] = lambda text: None) -> ModelShape:
    """The shapes of a model: an embedded name, a folder, or a hub id, of which only `config.json` is fetched.

    `say` is told in a few words before something that takes long.

    Raises:
        ValueError: no such model, or a `config.json` that does not describe a language model that transformers knows.
    """
    folder = _config_folder(model, revision, say)
    config_keys = _read_json(folder / "config.json", model)
    return _measure(_build(model, folder, config_keys))


def _config_folder(model: str, revision: str | None, say: Callable[[str], None]) -> Path:
    path = Path(model).expanduser()
    is_local = path.is_dir() or path.is_absolute() or model.startswith((".", "~"))
    if is_local or model.lower() in EMBEDDED:
        with log_to(say):
            return Path(resolve_model(model, revision=revision))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known = ", ".join(EMBEDDED)
    say(f"looking for {model} on the hub")
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except HFValidationError as error:
        raise ValueError(f"model {model}: neither a folder, nor an embedded model ({known}), nor a hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model {model}: no folder of this name, not embedded ({known}), and its config.json is not to be had from the "
            f"hub: {_first_line(error)}"
        ) from error


def _read_json(file: Path, model: str) -> dict[str, Any]:
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model {model}: its config.json is no JSON: {_first_line(error)}") from None
    if not isinstance(keys, dict):
        raise ValueError(f"model {model}: its config.json holds no mapping; take the one that the model was saved with")
    return keys


def _build(model: str, folder: Path, config_keys: dict[str, Any]) -> PreTrainedModel:
    """The model on the meta device."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in config_keys:
        raise ValueError(f"model {model}: its config.json lacks model_type; take the one that the model was saved with")
    try:
        config = AutoConfig.from_pretrained(folder)
        written = config_keys | config_keys.get("text_config", {})
        names = config.get_text_config().attribute_map or {}  # what a family calls them, such as n_embd
        missing = [key for key in NEEDED_KEYS if key not in written and names.get(key) not in written]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}; take the one that the model was saved with")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError, ImportError) as error:
        reason = _first_line(error)
        raise ValueError(f"model {model}: its config.json describes no model that can be planned: {reason}") from error


def _measure(model: PreTrainedModel) -> ModelShape:
    from torch import nn

    from ...model.policy import why_prompts_cannot_be_shared

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = [Matrix(name, module.in_features, module.out_features) for name, module in linear.items()]
    for name, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            matrices.append(Matrix(name, module.num_embeddings, module.embedding_dim))
    widths = _norm_widths(model, head_dim, {"q_norm": heads, "k_norm": kv_heads})
    return ModelShape(
        architecture=type(model).__name__,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        tied=embedding is not None and head is not None and embedding.weight is head.weight,
        biases=tuple(dict.fromkeys(name.rpartition(".")[2] for name, module in linear.items() if module.bias is not None)),
        parameters=model.num_parameters(),
        quantisable=sum(module.weight.numel() for module in linear.values() if module is not head),
        matrices=tuple(matrices),
        norm_width=sum(width for width, _ in widths),
        norm_rows=sum(rows for _, rows in widths),
        plain_reason=why_prompts_cannot_be_shared(model),
        unknown=_unknown(model, linear),
    )


def _norm_widths(model: nn.Module, head_dim: int, heads_of: dict[str, int]) -> list[tuple[int, int]]:
    """(elements, vectors) that each norm within the layers normalises for a token. Norms of queries and keys see each of
    `heads_of` where one weight serves all heads."""
    found = []
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        is_norm = len(parameters) == 1 and parameters[0].dim() == 1 and "norm" in name.rpartition(".")[2]
        if is_norm and ".layers." in name:
            width = parameters[0].numel()
            heads = heads_of.get(name.rpartition(".")[2], 1) if width == head_dim else 1
            found.append((width * heads, heads))
    return found


def _unknown(model: PreTrainedModel, linear: dict[str, nn.Linear]) -> tuple[str, ...]:
    config = model.config.get_text_config()
    reasons = []
    if any(getattr(config, name, None) for name in EXPERTS):
        reasons.append("it has experts: their activations are counted as one MLP's")
    by_parent: dict[str, set[str]] = defaultdict(set)
    for name in linear:
        by_parent[name.rpartition(".")[0]].add(name.rpartition(".")[2])
    attention = [parent for parent, roles in by_parent.items() if set(TARGET_PRESETS["attention"]) <= roles]
    if len(attention) != config.num_hidden_layers:
        reasons.append("not every layer has q_proj, k_proj, v_proj and o_proj: its activations are a guess")
    return tuple(reasons)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
