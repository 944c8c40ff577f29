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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import first_line
from ...common.log import logger
from ...common.model_files import EMBEDDED, resolve_model
from ...config.lora import TARGET_PRESETS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Without these in config.json transformers would build a model of its class's default sizes.
NEEDED_KEYS = ("model_type", "hidden_size", "num_hidden_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LAYER_NUMBER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer or the input embedding: its name in the model, its input and output width."""

    name: str
    d_in: int
    d_out: int

    @property
    def role(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The decoder layer that it belongs to, None outside of the layers."""
        found = LAYER_NUMBER.search(self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes and layers of a model.

    Attributes:
        architecture: transformers' class.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: the decoder's sizes; `intermediate` is the MLP's.
        tied: whether the head's weight is the input embedding's.
        biases: roles of the linear layers with a bias.
        parameters: of the base, tied weights once.
        quantisable: parameters of linear layers other than the head, which is what NF4 compresses.
        matrices: every linear layer and the input embedding.
        measured_config: the `config.json` with which a training pass is measured: that of the model, or that of a Llama of its
            sizes if the model is `unknown`.
        plain_reason: why prompts cannot be shared in training, None if they can.
        unknown: parts of the model whose memory is a guess, in words.
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
    measured_config: dict[str, Any]
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

    def has_like_layers(self, targets: str | Sequence[str]) -> bool:
        """Whether every layer has the same adapters."""
        roles: dict[int | None, set[str]] = {layer: set() for layer in range(self.layers)}
        for matrix in self.targeted(targets):
            roles.setdefault(matrix.layer, set()).add(matrix.role)
        roles.pop(None, None)
        return len({frozenset(one) for one in roles.values()}) == 1


def read_shape(model: str, *, revision: str | None = None) -> ModelShape:
    """The shapes of a model: an embedded name, a folder, or a Hub id, of which only `config.json` is fetched.

    Raises:
        ValueError: no such model, or a `config.json` that does not describe a language model that transformers knows.
    """
    folder = _config_folder(model, revision)
    config_keys = _read_json(folder / "config.json", model)
    return _measure(_build(model, folder, config_keys), config_keys)


def _config_folder(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    is_local = path.is_dir() or path.is_absolute() or model.startswith((".", "~"))
    if is_local or model.lower() in EMBEDDED:
        return Path(resolve_model(model, revision=revision))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known = ", ".join(EMBEDDED)
    logger.info(f"looking for {model} on the Hub")
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except HFValidationError as error:
        raise ValueError(f"model {model}: neither a folder, nor an embedded model ({known}), nor a Hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model {model}: no folder of this name, not embedded ({known}), and its config.json is not available on the "
            f"Hub: {first_line(error)}"
        ) from error


def _read_json(file: Path, model: str) -> dict[str, Any]:
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model {model}: its config.json is no JSON: {first_line(error)}") from None
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
        names = config.get_text_config().attribute_map or {}  # names in some families, such as n_embd
        missing = [key for key in NEEDED_KEYS if key not in written and names.get(key) not in written]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}; take the one that the model was saved with")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"model {model}: its config.json describes no model that can be planned: {reason}") from error


def _measure(model: PreTrainedModel, config_keys: dict[str, Any]) -> ModelShape:
    from torch import nn

    from ...model.policy import why_prompts_cannot_be_shared

    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = [Matrix(name, module.in_features, module.out_features) for name, module in linear.items()]
    for name, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            matrices.append(Matrix(name, module.num_embeddings, module.embedding_dim))
    unknown = _unknown(model, linear)
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    return ModelShape(
        architecture=type(model).__name__,
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocabulary=sizes["vocab_size"],
        tied=embedding is not None and head is not None and embedding.weight is head.weight,
        biases=tuple(dict.fromkeys(name.rpartition(".")[2] for name, module in linear.items() if module.bias is not None)),
        parameters=model.num_parameters(),
        quantisable=sum(module.weight.numel() for module in linear.values() if module is not head),
        matrices=tuple(matrices),
        measured_config={"model_type": "llama", **sizes} if unknown or "num_hidden_layers" not in config_keys else config_keys,
        plain_reason=why_prompts_cannot_be_shared(model),
        unknown=unknown,
    )


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
