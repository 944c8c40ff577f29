"""The section `optim` of a run's configuration: the optimizer, its schedule and the size of a step. Imports no torch."""

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from ...section import Section


class OptimConfig(Section):
    """AdamW, its schedule, and the size of a step."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate, above 0. LoRA takes about ten times that of full training; RL runs use 5e-6 to 1e-4."""

    rescale_learning_rate: bool = False
    """Take the learning rate as one for alpha 32 and make it mean the same at this rank and scale: B's rate times
    `32 / (scale * rank)`."""

    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """B's learning rate over A's (LoRA+, 2402.12354), above 0."""

    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of an adapter on the embedding, above 0, on the same schedule. None: 5e-5, or `learning_rate` where that
    is lower."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; `linear` and `cosine` fall to 0 at `max_steps`."""

    max_steps: int = Field(default=100, ge=1)
    """Steps of the run (batches of completions), at least 1."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0, below `max_steps`. LoRA starts at B = 0 and needs none."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts in a step; completions in a step are this times `rollout.num_generations`."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm (over all adapters), above 0."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW's state: `adamw` takes 8 bytes an adapter parameter; `adamw_8bit` (bitsandbytes) 2, and 8 for an adapter on the
    embedding; `paged_adamw_8bit` as many, which CUDA moves to the host while memory is short. CUDA only."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment, [0, 1)."""

    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment, [0, 1)."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator, above 0."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, at least 0."""

    tokens_per_pack: int = Field(default=4096, ge=1)
    """Token budget of one forward and backward pass; sets peak memory, not the update."""

    logits_mib: int | None = Field(default=None, ge=1)
    """Memory for the logits that are formed at a time, in MiB; fewer than 16 tokens' are never. None: 128 on CPU, 1024 on
    CUDA."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        max_steps = info.data.get("max_steps", math.inf)
        if warmup_steps >= max_steps:
            raise ValueError(f"must be below optim.max_steps, which is {max_steps} (got {warmup_steps})")
        return warmup_steps
