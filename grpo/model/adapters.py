"""The PEFT part of the policy: its LoRA layers, their initialisation, and whether a saved adapter fits.

    peft_model, notes = inject(model, lora, seed=0)     # our LoRA layers with PEFT's names and files
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from ..config import LoraConfig
from .lora_layers import FusedLoRAEmbedding, FusedLoRALinear
from .targets import find_targets, role, some

INITS = (True, False, "gaussian", "orthogonal", "eva")
"""PEFT's initialisations that leave the base weights unmodified."""

# Fields of a saved adapter on which the meaning of its weights depends.
DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def inject(base: PreTrainedModel, lora: LoraConfig, seed: int) -> tuple[PeftModel, tuple[str, ...]]:
    """Add our LoRA layers with fp32 master weights to `base`, initialised as `lora` says.

    Randomness depends on `seed` only. Also returns what a preset of `lora.targets` leaves out, and why.

    Raises:
        ValueError: see `find_targets`; PEFT would adapt other layers; or a key of `lora.rank_pattern` or `lora.alpha_pattern`
            has no effect, or only because of its position.
    """
    targets = find_targets(base, lora.targets)
    check_patterns(list(targets.modules), lora)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=_as_integer(lora.alpha),  # type: ignore[arg-type]
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={key: _as_integer(alpha) for key, alpha in lora.alpha_pattern.items()},
        use_rslora=lora.use_rslora,
        target_modules=targets.names,
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
    adapted = {name for name, module in base.named_modules() if isinstance(module, FusedLoRALinear | FusedLoRAEmbedding)}
    if missing := sorted(set(targets.modules) - adapted):
        raise ValueError(
            f"lora.targets: PEFT does not adapt {some(missing)}: in models with experts it takes such names for the experts. "
            f"Leave out {', '.join(sorted({role(name) for name in missing}))}"
        )
    return peft_model, targets.notes


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
