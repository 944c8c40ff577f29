"""PEFT's side of the policy: which layers get an adapter, how it begins, and whether a saved one fits.

    check_targets(model, lora.target_modules)       # every target names layers, and layers that can be adapted
    peft_model = inject(model, lora, seed=0)        # LoRA layers of ours inside the model, PEFT's names and files
    target_module_names("path/to/model", lora)      # ("q_proj", "lm_head", ...): what the sampler must be able to adapt
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key, match_target_against_key
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..config import LoraConfig
from .lora_layers import FusedLoRAEmbedding, FusedLoRALinear

# What of a saved adapter decides which function its weights are.
DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def check_targets(model: PreTrainedModel, targets: Sequence[str] | str) -> None:
    """See that an adapter can be put where `targets` (module names, or an expression for whole names) says.

    Raises:
        ValueError: a name or the expression fits no module of the model, or fits one that is neither linear nor the input
            embedding.
    """
    kind = type(model).__name__
    for target in [targets] if isinstance(targets, str) else targets:
        if not _targeted_modules(model, targets if isinstance(targets, str) else [target]):
            raise ValueError(f"lora.targets: {kind} has no layer {target}")
    others = {
        name: module
        for name, module in _targeted_modules(model, targets).items()
        if not isinstance(module, nn.Linear) and module is not model.get_input_embeddings()
    }
    norms = [name for name, module in others.items() if _is_norm(module)]
    if norms and len(norms) == len(others):
        raise ValueError(
            f"lora.targets: {_some(norms)} cannot be adapted, since LoRA on norm layers is refused: their weights are vectors, "
            "of which a low rank means nothing, and vLLM cannot serve it; take them out"
        )
    if others:
        raise ValueError(
            f"lora.targets: {_some(list(others))} cannot be adapted: only linear layers and the input embedding can"
        )


def target_module_names(model_path: str, lora: LoraConfig) -> tuple[str, ...]:
    """The last parts of the names of `lora`'s targets, each once, such as `q_proj`: the sampler's layers go by these.

    For an expression the model is built without weights, to see what it fits.

    Raises:
        ValueError: an expression fits no layer, or one that cannot be adapted.
    """
    names: Iterable[str] = lora.target_modules
    if isinstance(lora.target_modules, str):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
        check_targets(model, lora.target_modules)
        names = _targeted_modules(model, lora.target_modules)
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def inject(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Put our LoRA layers with fp32 masters into `base`, begun as `lora` says; `seed` alone decides the draw.

    Raises:
        ValueError: a key of `lora.rank_pattern` or `lora.alpha_pattern` decides nothing, or only by coming first.
    """
    _check_patterns(list(_targeted_modules(base, lora.target_modules)), lora)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=_whole(lora.alpha),  # type: ignore[arg-type]
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={key: _whole(alpha) for key, alpha in lora.alpha_pattern.items()},
        use_rslora=lora.use_rslora,
        target_modules=lora.target_modules,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: FusedLoRALinear, nn.Embedding: FusedLoRAEmbedding})
    # PEFT draws from the global generator; the run's seed, and nothing that ran before, decides what it draws.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # An adapter on a head that is tied to the embedding is the head's alone, and one on the embedding the embedding's,
        # here as in vLLM. Nothing is merged.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        torch.manual_seed(seed)
        peft_model = get_peft_model(base, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def check_saved_config(folder: Path, ours: PeftConfig) -> None:
    """See that the weights of the adapter in `folder` mean there what they would mean under our configuration.

    Raises:
        ValueError: they make another function, or a kind of adapter that is not offered.
    """
    theirs = cast(PeftLoraConfig, PeftLoraConfig.from_pretrained(str(folder)))
    for name in DECISIVE:
        their_value, our_value = getattr(theirs, name), getattr(ours, name)
        if their_value != our_value:
            raise ValueError(
                f"the adapter in {folder} does not fit this configuration: its {name} is {their_value}, not {our_value}"
            )
    for name in ("use_dora", "lora_bias", "lora_dropout"):
        if getattr(theirs, name):
            raise ValueError(f"the adapter in {folder} was made with {name}, which trainer and sampler do not share")
    if theirs.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"the adapter in {folder} belongs to base weights that {theirs.init_lora_weights} has changed")


def load_weights(peft_model: PeftModel, folder: Path, *, device: str = "cpu") -> None:
    """Read the weights of the adapter in `folder` into a model that has one of the same names and shapes.

    Raises:
        ValueError: they are not the same. Nothing was read then.
    """
    weights = load_peft_weights(str(folder), device=device)
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    shapes, expected_shapes = ({key: t.shape for key, t in tensors.items()} for tensors in (weights, expected))
    misfits = sorted(key for key, _ in shapes.items() ^ expected_shapes.items())
    if misfits:
        raise ValueError(f"the adapter in {folder} does not fit this model and lora.targets, see {misfits[0]}")
    set_peft_model_state_dict(peft_model, weights)


def _targeted_modules(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """Every module that PEFT would put an adapter on, by name: names fit as ends, an expression fits the whole name."""

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return match_target_against_key(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return {name: module for name, module in model.named_modules() if name and is_target(name)}


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a layer whose parameters are vectors, such as RMSNorm and LayerNorm."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(parameter.dim() == 1 for parameter in parameters)


def _some(names: Sequence[str]) -> str:
    """The first three names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_patterns(names: Sequence[str], lora: LoraConfig) -> None:
    for option, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        decides = {name: get_pattern_key(list(pattern), name) for name in names}  # the name itself where no key fits
        idle = [key for key in pattern if key not in decides.values()]
        if idle:
            raise ValueError(
                f"lora.{option}: {idle[0]} decides no layer of lora.targets (of the keys that fit a layer the first counts)"
            )
        # PEFT's files keep the keys in alphabetical order, and whoever loads one goes by that order.
        for name, key in decides.items():
            in_file = get_pattern_key(sorted(pattern), name)
            if pattern.get(in_file) != pattern.get(key):
                raise ValueError(
                    f"lora.{option}: {key} and {in_file} both fit {name}, and PEFT would forget which one came first: "
                    "write keys that fit different layers"
                )


def _whole(alpha: float) -> float:
    """A whole alpha as PEFT's files usually have it, `32` for `32.0`."""
    return int(alpha) if alpha.is_integer() else alpha
