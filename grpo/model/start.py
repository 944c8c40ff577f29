"""An existing adapter that training starts from: what is supported, which options come from it, and its conversion.

    config, start = resolve_start(config, model_path)      # ranks, scales and targets that are not set come from it
    Policy(model_path, lora=config.lora, start=start)      # the same function as that adapter in stock PEFT

The configuration decides about ranks, scales and targets of the training; an adapter that has others is converted exactly.
With a larger rank, the new rows of A are initialised as usual and the new columns of B are zero. With another scale, the ratio
is folded into B. Layers that the adapter does not have start at zero, as in a new adapter. Nothing is truncated: ranks that are
set smaller than the adapter's are raised to it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import load_peft_weights
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...rollout.model_classes import build_model
from ..common.errors import first_line
from ..common.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, resolve_adapter
from ..config import GRPOConfig, LoraConfig
from ..config.lora import MAX_RANK
from ..config.run_config import with_options
from .adapters import INITS, check_patterns
from .base_model import saved_weight
from .lora_layers import ADAPTER, FusedLoRALayer
from .targets import find_targets, preset_of, some, targeted_modules

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<embedding>embedding_)?(?P<role>[AB])(\.weight)?")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights; smaller ones mean nothing without scales, which PEFT's format has not."""
WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
}
"""Fields of PEFT's configuration that are read here, or that do not change the function of an adapter, given its weights."""
REASONS = {
    "use_dora": "vLLM cannot serve DoRA",
    "bias": "only the LoRA layers are trained, no biases",
    "lora_bias": "vLLM cannot serve biases of LoRA layers",
    "modules_to_save": "only the LoRA layers are trained, no complete layers",
    "alora_invocation_tokens": "the adapter is applied to all tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFactors:
    """The adapter of one layer: its update is `scaling * b @ a`, transposed for an embedding."""

    a: torch.Tensor
    """[r, d_in]; for an embedding [r, V]."""
    b: torch.Tensor
    """[d_out, r]; for an embedding [D, r]."""
    scaling: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAdapter:
    """An adapter that was read from a folder, on the CPU.

    Attributes:
        peft: its configuration.
        layers: by the name of the layer in the model.
        base_weights: weights of the base model in the same file, by name: PEFT adds those of targeted embeddings.
    """

    folder: Path
    peft: PeftLoraConfig
    layers: Mapping[str, LayerFactors]
    base_weights: Mapping[str, torch.Tensor]

    @property
    def fingerprint(self) -> str:
        """Hash of all weights and scales."""
        digest = hashlib.blake2b(digest_size=16)
        for name, layer in sorted(self.layers.items()):
            for tensor in (layer.a, layer.b):
                digest.update(f"{name} {layer.scaling!r} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def resolve_start(config: GRPOConfig, model_path: str) -> tuple[GRPOConfig, StartAdapter | None]:
    """Read the adapter of `lora.start_from`, and take ranks, scales and targets that are not set from it.

    Returns the configuration, unchanged if it has no such adapter or all of these options, and the adapter.

    Raises:
        ValueError: there is no such adapter, it is of an unsupported kind, or it does not fit the model or the options that are
            set.
    """
    if config.lora.start_from is None:
        return config, None
    start = read_start(resolve_adapter(config.lora.start_from))
    return _with_options(config, start, model_path), start


# ------------------------------------------------------------------------------------------------------------- reading


def read_start(folder: Path) -> StartAdapter:
    """Read the adapter in `folder`, a result of `resolve_adapter`.

    Raises:
        ValueError: the adapter is of an unsupported kind, or damaged.
    """
    peft = _read_config(folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    embeddings: set[str] = set()
    base_weights = {}
    for key, tensor in _read_weights(folder).items():
        match = LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            base_weights[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        found.setdefault(match["name"], {})[match["role"]] = tensor
        if match["embedding"]:
            embeddings.add(match["name"])
    layers = {}
    for name, pair in found.items():
        rank = _of_layer(name, peft.rank_pattern or {}, peft.r)
        if set(pair) != {"A", "B"} or [*pair["A"].shape[:1], *pair["B"].shape[1:]] != [rank, rank]:
            shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(pair.items()))
            raise ValueError(f"the adapter in {folder} is damaged: {name} has {shapes}, and rank {rank} in {ADAPTER_CONFIG}")
        if rank > MAX_RANK:
            raise ValueError(f"the adapter in {folder} has rank {rank} in {name}: at most {MAX_RANK} can be trained")
        scaling = _of_layer(name, peft.alpha_pattern or {}, peft.lora_alpha) / (rank**0.5 if peft.use_rslora else rank)
        layers[name] = LayerFactors(a=pair["A"], b=pair["B"], scaling=scaling, is_embedding=name in embeddings)
    if not layers:
        raise ValueError(f"the adapter in {folder} has no LoRA layers")
    return StartAdapter(folder=folder, peft=peft, layers=layers, base_weights=base_weights)


def _read_config(folder: Path) -> PeftLoraConfig:
    """The adapter's configuration. ValueError if anything in it means more than LoRA layers."""
    try:
        values: dict[str, Any] = dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapter in {folder} is damaged: {ADAPTER_CONFIG} is not JSON: {first_line(error)}") from error
    if values.get("peft_type") != "LORA":
        raise ValueError(f"the adapter in {folder} is of type {values.get('peft_type')}: training can only start from LORA")
    defaults = PeftLoraConfig()
    for name, value in values.items():
        # PEFT ignores unknown fields, which later versions add; what they add is off if it is empty.
        is_off = not value or (hasattr(defaults, name) and value == getattr(defaults, name))
        if name not in WITHOUT_EFFECT and not is_off:
            reason = REASONS.get(name, "training can only start from plain LoRA layers")
            raise ValueError(f"the adapter in {folder} has {name}={value}, which is not supported: {reason}")
    init = values.get("init_lora_weights", True)
    if init not in INITS:
        raise ValueError(
            f"the adapter in {folder} was initialised with {init}, which also changes the base weights: convert it to plain "
            "LoRA (PEFT's path_initial_model_for_weight_conversion), or merge it into its base model"
        )
    _check_types(folder, values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # they are off
        return cast(PeftLoraConfig, PeftLoraConfig.from_pretrained(str(folder)))


def _check_types(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError for fields that PEFT would read and fail on later."""
    wanted: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float)}
    wanted |= {"rank_pattern": (dict, NoneType), "alpha_pattern": (dict, NoneType), "target_modules": (str, list, NoneType)}
    for name, kinds in wanted.items():
        if name in values and not isinstance(values[name], kinds):
            raise ValueError(f"the adapter in {folder} is damaged: {ADAPTER_CONFIG} has {name}={values[name]!r}")
    patterns = [*(values.get("rank_pattern") or ()), *(values.get("alpha_pattern") or ())]
    targets = values.get("target_modules")
    for pattern in [*patterns, *([targets] if isinstance(targets, str) else [])]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"the adapter in {folder} is damaged: {pattern!r} in {ADAPTER_CONFIG} is no regular expression: {error}"
            ) from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the adapter in {folder} has no {ADAPTER_WEIGHTS[0]}, and {ADAPTER_WEIGHTS[1]} has more than tensors, which is "
            "not safe to load: save the adapter as safetensors"
        ) from error
    except (SafetensorError, EOFError, RuntimeError, KeyError) as error:  # KeyError: a pickle that is none
        raise ValueError(f"the adapter in {folder} is damaged: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"the adapter in {folder} is damaged: {ADAPTER_WEIGHTS[1]} has other things than tensors")
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            problem = "values that are not finite" if tensor.dtype in FLOATS else f"the type {tensor.dtype}"
            raise ValueError(f"the adapter in {folder} cannot be trained: {name} has {problem}")
    return weights


def _of_layer(name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The layer's value, as PEFT finds it in a pattern."""
    return pattern.get(get_pattern_key(list(pattern), name), default)


# --------------------------------------------------------------------------------------------------- the configuration


def _with_options(config: GRPOConfig, start: StartAdapter, model_path: str) -> GRPOConfig:
    """The configuration with the adapter's ranks, scales and targets where these are not set."""
    with torch.device("meta"):
        model = build_model(AutoConfig.from_pretrained(model_path))
    _check_shapes(start, model)
    _check_all_layers(start, model)
    set_by_user = config.lora.model_dump(exclude_unset=True)
    options = {**_taken(start, model, config.lora.model_fields_set), **set_by_user}
    notes = _raise_ranks(options, start)
    changed = with_options(config, {"lora": options}, notes=notes)
    _check_layers(start, model, changed.lora)
    _check_base_weights(start, model, model_path)
    check_patterns(list(find_targets(model, changed.lora.targets).modules), changed.lora)
    return changed


def _taken(start: StartAdapter, model: PreTrainedModel, is_set: set[str]) -> dict[str, Any]:
    """The options that training takes from the adapter. A pattern means nothing without its rank or alpha."""
    peft = start.peft
    options: dict[str, Any] = {"rank": peft.r, "alpha": peft.lora_alpha, "use_rslora": peft.use_rslora}
    patterns = (("rank", "rank_pattern", peft.rank_pattern or {}), ("alpha", "alpha_pattern", peft.alpha_pattern or {}))
    for option, name, pattern in patterns:
        if option not in is_set:
            used = {get_pattern_key(list(pattern), layer) for layer in start.layers}
            options[name] = {key: value for key, value in pattern.items() if key in used}
    options["targets"] = _targets(start, model)
    return options


def _raise_ranks(options: dict[str, Any], start: StartAdapter) -> list[str]:
    """Raise ranks that are smaller than those of the adapter's layers, in place; returns notes."""
    pattern = dict(options.get("rank_pattern") or {})
    rank = options["rank"]
    for name, layer in start.layers.items():
        key = get_pattern_key(list(pattern), name)
        if key in pattern:
            pattern[key] = max(pattern[key], layer.rank)
        else:
            rank = max(rank, layer.rank)
    raised = [("lora.rank", options["rank"], rank)]
    raised += [(f"lora.rank_pattern.{key}", was, pattern[key]) for key, was in (options.get("rank_pattern") or {}).items()]
    options |= {"rank": rank} | ({"rank_pattern": pattern} if pattern else {})
    return [f"{name}: {now}, not {was}, which the adapter of lora.start_from has" for name, was, now in raised if now > was]


def _targets(start: StartAdapter, model: PreTrainedModel) -> str | list[str]:
    """`lora.targets` for the layers of the adapter: a preset, its own names or expression, or else their complete names."""

    def selects_them(targets: str | list[str]) -> bool:
        return set(targeted_modules(model, targets)) == set(start.layers)

    if preset := preset_of(model, start.layers):
        return preset
    own = start.peft.target_modules
    own = own if isinstance(own, str) else sorted(own or ())
    # Other fields of PEFT can leave out some of its layers, and a name alone is no expression here.
    return own if selects_them(own) and own not in list(start.layers) else list(start.layers)


def _names_of(model: PreTrainedModel, name: str) -> list[str]:
    """Names of a parameter: one that is tied has several, and files have only one of them."""
    parameter = model.get_parameter(name)
    return [name, *(other for other, tied in model.named_parameters(remove_duplicate=False) if tied is parameter)]


# --------------------------------------------------------------------------------------------------------------- checks


def _check_layers(start: StartAdapter, model: PreTrainedModel, lora: LoraConfig) -> None:
    """Check that all layers of the adapter are trained."""
    targeted = find_targets(model, lora.targets).modules
    if left_out := [name for name in start.layers if name not in targeted]:
        raise ValueError(
            f"lora.targets: the adapter in {start.folder} also has {some(left_out)}: add them, or leave this option out"
        )


def _check_base_weights(start: StartAdapter, model: PreTrainedModel, model_path: str) -> None:
    """Check that weights of the base model in the adapter's file are unmodified copies."""
    for name, tensor in start.base_weights.items():
        original = saved_weight(model_path, _names_of(model, name))
        if original is None or not torch.equal(original.to(tensor.dtype), tensor):
            differs = "cannot be compared with" if original is None else "differs from that of"
            raise ValueError(
                f"the adapter in {start.folder} comes with {name}, which {differs} the base model: training changes the LoRA "
                "layers only. Merge the adapter into its base model"
            )


def _check_all_layers(start: StartAdapter, model: PreTrainedModel) -> None:
    """Check that the adapter has every layer of this model that its own configuration selects."""
    if start.peft.target_modules is None:
        return
    selected = [name for name, _ in model.named_modules() if name and check_target_module_exists(start.peft, name)]
    if missing := [name for name in selected if name not in start.layers]:
        raise ValueError(
            f"the adapter in {start.folder} does not fit this model: its target_modules also select {some(missing)}, for which "
            f"it has no weights; {_trained_on(start)}"
        )


def _trained_on(start: StartAdapter) -> str:
    base = start.peft.base_model_name_or_path
    return f"it was trained on {base}" if base else "was it trained on another base model?"


def _check_shapes(start: StartAdapter, model: PreTrainedModel) -> None:
    modules, embedding = dict(model.named_modules()), model.get_input_embeddings()
    hint = _trained_on(start)
    misfit = f"the adapter in {start.folder} does not fit this model"
    for name, layer in start.layers.items():
        module, expected = modules.get(name), None
        if layer.is_embedding and module is embedding:
            expected = (module.num_embeddings, module.embedding_dim)  # type: ignore[union-attr]
        elif not layer.is_embedding and isinstance(module, nn.Linear):
            expected = (module.in_features, module.out_features)
        if expected is None:
            raise ValueError(f"{misfit}: there is no layer {name} that can have it; {hint}")
        shape = (layer.a.shape[1], layer.b.shape[0])
        if shape != expected:
            sizes = f"{shape[0]} to {shape[1]}, not from {expected[0]} to {expected[1]}"
            raise ValueError(f"{misfit}: its {name} is from {sizes}; {hint}")
    parameters = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, tensor in start.base_weights.items():
        if name not in parameters:
            raise ValueError(f"{misfit}: {name} is neither a LoRA layer nor a weight of the model; {hint}")
        if parameters[name] != tensor.shape:
            shapes = f"{list(tensor.shape)}, not {list(parameters[name])}"
            raise ValueError(f"{misfit}: it comes with {name} of shape {shapes}; {hint}")


# ----------------------------------------------------------------------------------------------------------- conversion


@torch.no_grad()
def write_start(layers: Mapping[str, FusedLoRALayer], start: StartAdapter) -> None:
    """Write the adapter into the newly initialised master weights of `layers`, so that every update is the same matrix."""
    for name, factors in start.layers.items():
        layer, rank = layers[name], factors.rank
        a, b = layer.master_a, layer.master_b
        a[:rank] = factors.a.to(a)
        b[:, :rank] = (factors.b.double() * (factors.scaling / layer.scaling[ADAPTER])).to(b)
        if not factors.is_embedding:  # whose new rows of A are zero already
            b[:, rank:] = 0  # not zero after an orthogonal initialisation


# ----------------------------------------------------------------------------------------------------------------- notes


def describe_start(config: GRPOConfig, model_path: str) -> Iterator[str]:
    """Notes about the adapter that training starts from, if there is one. `config`: as `resolve_start` returns it."""
    lora = config.lora
    if lora.start_from is None:
        return
    peft = _read_config(resolve_adapter(lora.start_from))
    ours, theirs = (
        (options.rank_pattern, options.alpha_pattern, options.use_rslora, rank, float(alpha))
        for options, rank, alpha in ((lora, lora.rank, lora.alpha), (peft, peft.r, peft.lora_alpha))
    )
    conversion = f", converted from rank {peft.r} and alpha {peft.lora_alpha:g}" if ours != theirs else ""
    yield f"training starts from the adapter {lora.start_from}: rank {lora.rank}, alpha {lora.alpha:g}{conversion}"
    if peft.lora_dropout:
        yield f"the adapter {lora.start_from} was trained with dropout {peft.lora_dropout:g}; this run trains it without"
    base, name = peft.base_model_name_or_path, config.model.name
    if base and {base, Path(base).name.lower()}.isdisjoint({name, model_path, Path(name).name.lower()}):
        yield f"the adapter {lora.start_from} was trained on {base}, and this run trains {name}: the shapes fit"
