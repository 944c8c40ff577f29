"""The operations of a transformers model after its last hidden state, as the kernels' `Head`.

    head = head_of(model)    # weight, soft cap and scale; the policy handles an adapter on the head

Families use different names for the same thing, and one name can mean a factor or a divisor. Unlisted operations are refused:
an unnoticed change to the logits would train another policy than the one that is sampled.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...kernels.logprob import Head

# Family (how its model_type begins): the field of its configuration that scales the logits, and the power that it enters with.
SCALES = {"cohere": ("logit_scale", 1), "granite": ("logits_scaling", -1), "hyperclovax": ("logits_scaling", 1)}
# Fields with which a model changes its logits, or the hidden states before its head, and the values that change nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
    "logits_mup_width_multiplier": (None, 1),
    "logits_soft_cap": (None, 0),
    "output_logit_soft_cap": (None, 0),
}


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; its weight is the tensor of the model, detached.

    Raises:
        ValueError: the head is no linear layer, or has a bias, or the model changes its logits in a way not implemented here.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{type(model).__name__} has no plain linear head: its log-probabilities are not implemented")
    config = model.config.get_text_config()
    field, power = next((known for family, known in SCALES.items() if config.model_type.startswith(family)), (None, 0))
    for name, neutral in NEUTRAL_VALUES.items():
        if name != field and getattr(config, name, None) not in neutral:
            raise ValueError(
                f"{type(model).__name__} changes its logits ({name}): its log-probabilities are not implemented"
            )
    scale = None if field is None else getattr(config, field)
    return Head(
        weight_VD=head.weight.detach(),
        softcap=getattr(config, "final_logit_softcapping", None) or None,
        scale=1.0 if scale is None else float(scale) ** power,
    )
