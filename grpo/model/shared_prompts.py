"""Whether a model can take packs with shared prompts, and how it is made to.

    reason = why_prompts_cannot_be_shared(model)        # None, or words
    take_packs(model)                                   # once
    set_attention(model, PACKED_ATTENTION)              # plain_attention(model): rows again
    with packs_of(layout):                              # around forward and backward
        model(...)
"""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel

from ...kernels.shared_prompt_attention import NAME as PACKED_ATTENTION
from ...kernels.shared_prompt_attention import SharedPromptLayout, register
from ...kernels.shared_prompt_attention import active as packs_of
from ...kernels.shared_prompt_recurrence import install, layers_with_state, why_not
from ...rollout.model_classes import has_tower

__all__ = [
    "PACKED_ATTENTION",
    "SharedPromptLayout",
    "packs_of",
    "plain_attention",
    "set_attention",
    "take_packs",
    "why_prompts_cannot_be_shared",
]

ATTENTION_KINDS = ("full_attention", "sliding_attention")
TOKENWISE_KINDS = ("mlp", "moe", "dense", "sparse")
"""Entries of `layer_types`: what shares prompts as attention does, and what does not mix tokens at all."""


def take_packs(model: PreTrainedModel) -> None:
    """Make the layers with a state take packs within `packs_of`, and `PACKED_ATTENTION` known."""
    register()
    install(model)


def why_prompts_cannot_be_shared(model: PreTrainedModel) -> str | None:
    """None if prompts can be shared by all layers that mix tokens, and attention is causal; else the reason, in words."""
    config = model.config.get_text_config()
    if not _attention_can_be_replaced(model):
        return "its attention cannot be replaced"
    kinds: list[str] = getattr(config, "layer_types", None) or []
    other_kinds = [kind for kind in kinds if kind not in ATTENTION_KINDS and kind not in TOKENWISE_KINDS]
    if len(other_kinds) > len(layers_with_state(model)):
        return f"it has {', '.join(sorted(set(other_kinds)))} layers"
    if reason := why_not(model):
        return reason
    if not kinds and getattr(config, "sliding_window", None) and not _passes_window(model):
        return "only its masks know its sliding window"
    if (
        getattr(config, "is_encoder_decoder", False)
        or not getattr(config, "is_causal", True)
        or getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")  # of images only
    ):
        return "its attention is not causal"
    return None


def _attention_can_be_replaced(model: PreTrainedModel) -> bool:
    """Whether all attention calls what `AttentionInterface` has. Not all models that do say so."""
    kinds = {type(module) for module in model.modules() if "Attention" in type(module).__name__}
    return bool(kinds) and all("attention_interface(" in inspect.getsource(kind.forward) for kind in kinds)


def _passes_window(model: PreTrainedModel) -> bool:
    """Whether attention gets the window as an argument, as in transformers' newer models, besides a mask."""
    kinds = {type(module) for module in model.modules() if hasattr(module, "layer_idx")}
    return any("sliding_window=" in inspect.getsource(kind.forward) for kind in kinds)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set what computes attention. Of a tower that was removed it stays: transformers would warn at each change."""
    model.set_attn_implementation({"": name, "text_config": name} if has_tower(model.config) else name)


def plain_attention(model: PreTrainedModel) -> str:
    """What computes one row per completion. torch's `scaled_dot_product_attention` would leave out a cap on the scores."""
    caps_scores = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if caps_scores or not getattr(model, "_supports_sdpa", False) else "sdpa"
