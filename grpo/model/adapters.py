"""The PEFT part of the policy: which layers get an adapter, its initialisation, and whether a saved adapter fits.

    check_targets(model, lora.target_modules)       # every target matches layers that can be adapted
    peft_model = inject(model, lora, seed=0)        # our LoRA layers with PEFT's names and files
    target_module_names("path/to/model", lora)      # ("q_proj", "lm_head", ...): layers that vLLM must adapt
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

INITS = (True, False, "gaussian", "orthogonal", "eva")
"""PEFT's initialisations that leave the base weights unmodified."""

# Fields of a saved adapter on which the meaning of its weights depends.
DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def check_targets(model: PreTrainedModel, targets: Sequence[str] | str) -> None:
    """Check that the modules selected by `targets` (names, or a regular expression for complete names) can be adapted.

    Raises:
        ValueError: a name or the expression matches no module, or one that is neither linear nor the input embedding.
    """
    embedding = model.get_input_embeddings()
    adaptable = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) or module is embedding}
    for target in [targets] if isinstance(targets, str) else targets:
        if not targeted_modules(model, targets if isinstance(targets, str) else [target]):
            roles = ", ".join(sorted({name.rpartition(".")[2] for name in adaptable}))
            raise ValueError(f"lora.targets: {type(model).__name__} has no layer {target}; name some of {roles}")
    others = {name: module for name, module in targeted_modules(model, targets).items() if name not in adaptable}
    norms = [name for name, module in others.items() if _is_norm(module)]
    if norms and len(norms) == len(others):
        raise ValueError(
            f"lora.targets: {some(norms)} cannot be adapted: LoRA does not apply to norm layers, whose weights are vectors; "
            "remove them"
        )
    if others:
        raise ValueError(
            f"lora.targets: {some(list(others))} cannot be adapted: only linear layers and the input embedding can"
        )


def target_module_names(model_path: str, lora: LoraConfig) -> tuple[str, ...]:
    """The last parts of the names of all targeted modules, each once, such as `q_proj`: vLLM selects layers by these.

    For a regular expression, builds the model without weights to match it.

    Raises:
        ValueError: the expression matches no layer, or one that cannot be adapted.
    """
    names: Iterable[str] = lora.target_modules
    if isinstance(lora.target_modules, str):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
        check_targets(model, lora.target_modules)
        names = targeted_modules(model, lora.target_modules)
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def inject(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Add our LoRA layers with fp32 master weights to `base`, initialised as `lora` says; randomness depends on `seed` only.

    Raises:
        ValueError: a key of `lora.rank_pattern` or `lora.alpha_pattern` has no effect, or only because of its position.
    """
    check_patterns(list(targeted_modules(base, lora.target_modules)), lora)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=_as_integer(lora.alpha),  # type: ignore[arg-type]
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={key: _as_integer(alpha) for key, alpha in lora.alpha_pattern.items()},
        use_rslora=lora.use_rslora,
        target_modules=lora.target_modules,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: FusedLoRALinear, nn.Embedding: FusedLoRAEmbedding})
    # PEFT draws from the global generator, which must depend on the seed of the run only.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # With tied weights, an adapter on the head affects the head only, and one on the embedding only the embedding, here as
        # in vLLM. Nothing is merged.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        torch.manual_seed(seed)
        peft_model = get_peft_model(base, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def check_saved_config(folder: Path, ours: PeftConfig) -> None:
    """Check that the weights of the adapter in `folder` have the same meaning with our configuration.

    Raises:
        ValueError: its rank, scale or patterns differ, or it is of an unsupported kind.
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
            raise ValueError(f"the adapter in {folder} uses {name}, which is not supported: vLLM would sample another policy")
    if theirs.init_lora_weights not in INITS:
        raise ValueError(f"the adapter in {folder} needs the base weights changed by {theirs.init_lora_weights}: not supported")


def load_weights(peft_model: PeftModel, folder: Path, *, device: str = "cpu") -> None:
    """Load the weights of the adapter in `folder` into a model whose adapter has the same names and shapes.

    Raises:
        ValueError: names or shapes differ; the model is then unchanged.
    """
    weights = load_peft_weights(str(folder), device=device)
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    shapes, expected_shapes = ({key: t.shape for key, t in tensors.items()} for tensors in (weights, expected))
    misfits = sorted(key for key, _ in shapes.items() ^ expected_shapes.items())
    if misfits:
        raise ValueError(f"the adapter in {folder} does not fit this model and lora.targets, see {misfits[0]}")
    set_peft_model_state_dict(peft_model, weights)


def targeted_modules(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """All modules that PEFT would adapt, by name: names match as suffixes, a regular expression matches complete names."""

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return match_target_against_key(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return {name: module for name, module in model.named_modules() if name and is_target(name)}


def _is_norm(module: nn.Module) -> bool:
    """Whether all parameters of a layer are vectors, as in RMSNorm and LayerNorm."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(parameter.dim() == 1 for parameter in parameters)


def some(names: Sequence[str]) -> str:
    """The first three names, and the number of others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_patterns(names: Sequence[str], lora: LoraConfig) -> None:
    """Check the patterns of ranks and alphas against the names of all layers with an adapter.

    Raises:
        ValueError: a key has no effect, or only because of its position.
    """
    for option, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        matches = {name: get_pattern_key(list(pattern), name) for name in names}  # the name itself if no key matches
        unused = [key for key in pattern if key not in matches.values()]
        if unused:
            raise ValueError(
                f"lora.{option}: {unused[0]} applies to no layer of lora.targets (the first key that matches a layer is used)"
            )
        # PEFT's files sort the keys alphabetically, so after loading another key may be the first that matches.
        for name, key in matches.items():
            in_file = get_pattern_key(sorted(pattern), name)
            if pattern.get(in_file) != pattern.get(key):
                raise ValueError(
                    f"lora.{option}: {key} and {in_file} both match {name}, and PEFT does not save their order: use keys that "
                    "match different layers"
                )


def _as_integer(alpha: float) -> float:
    """An integral alpha as an integer, `32` for `32.0`, as is usual in PEFT's files."""
    return int(alpha) if alpha.is_integer() else alpha
