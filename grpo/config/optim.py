"""The section `optim`: optimizer, learning-rate schedule and batch size. Imports no torch."""

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from ...section import Section


class OptimConfig(Section):
    """AdamW, its schedule, and the batch size."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate, above 0. LoRA needs about ten times that of full fine-tuning; RL runs use 5e-6 to 1e-4."""

    rescale_learning_rate: bool = False
    """Treat `learning_rate` as the rate for alpha 32 and keep the same effective step at this rank and scale: B's learning rate
    is multiplied by `32 / (scale * rank)`."""

    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """Ratio of B's learning rate to A's (LoRA+, 2402.12354), above 0."""

    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of an adapter on the embedding, above 0, with the same schedule. None: 5e-5, or `learning_rate` if that is
    lower."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after warm-up; `linear` and `cosine` decay to 0 at `max_steps`."""

    max_steps: int = Field(default=100, ge=1)
    """Number of steps of the run (batches of completions), at least 1."""

    warmup_steps: int = Field(default=0, ge=0)
    """Number of steps over which the learning rate rises from 0, below `max_steps`. LoRA starts at B = 0 and needs none."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts per step, over all workers; completions per step are this times `rollout.num_generations`."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm (over all adapters), above 0."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Optimizer: the state of `adamw` takes 8 bytes per adapter parameter; that of `adamw_8bit` (bitsandbytes) 2, or 8 for
    an adapter on the embedding; `paged_adamw_8bit` (CUDA only) takes as many, which CUDA moves to the host when memory is
    short."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment, [0, 1)."""

    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment, [0, 1)."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator, above 0."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, at least 0."""

    tokens_per_pack: int = Field(default=4096, ge=1)
    """Token budget of one forward and backward pass; affects peak memory, not the update."""

    logits_mib: int | None = Field(default=None, ge=1)
    """Memory for the logits of one chunk, in MiB; a chunk has at least 16 tokens. None: 128 on CPU, 1024 on CUDA."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends_before_the_run(cls, warmup_steps: int, info: ValidationInfo) -> int:
        max_steps = info.data.get("max_steps", math.inf)
        if warmup_steps >= max_steps:
            raise ValueError(f"must be below optim.max_steps, which is {max_steps} (got {warmup_steps})")
        return warmup_steps
