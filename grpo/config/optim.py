"""The section `optim`: optimizer, learning-rate schedule and batch size. Imports no torch."""

import math
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...section import Section

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "decay_type", "min_lr_ratio", "num_cycles"),
}
"""The keys of `optim.lr_scheduler_kwargs` for each schedule. Names and formulas are those of transformers."""

USUAL_TOKENS_PER_PACK = 4096
"""`optim.tokens_per_pack` where nothing decides it: on CPU, or if the memory of the model or of the device is not known."""

DECAY_TYPES = ("linear", "cosine", "1-sqrt")


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

    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "constant"
    """Schedule of the learning rate after warm-up, by transformers' names and formulas; `linear` and `cosine` decay to 0 at
    `max_steps`. Every schedule has the warm-up, `constant` too."""

    lr_scheduler_kwargs: dict[str, float | str] = Field(default={}, validate_default=True)
    """Parameters of the schedule: `num_cycles` (cosine, default 0.5; with restarts 1), `min_lr` or `min_lr_rate`
    (cosine_with_min_lr), `lr_end` and `power` (polynomial, 1e-7 and 1), `timescale` (inverse_sqrt, the warm-up or 10000),
    `num_decay_steps`, `decay_type`, `min_lr_ratio` and `num_cycles` (warmup_stable_decay)."""

    max_steps: int = Field(default=100, ge=1)
    """Number of steps of the run (batches of completions), at least 1. None or TRL's -1: `num_train_epochs`, else 100."""

    num_train_epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the training data, above 0; it sets `max_steps` once the data is loaded. An explicit
    `max_steps` takes precedence. None: `max_steps`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Number of steps over which the learning rate rises from 0, below `max_steps`. LoRA starts at B = 0 and needs none."""

    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """The same as a share of `max_steps`, [0, 1), rounded up. Set one of the two."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts per step, over all workers; completions per step are this times `rollout.num_generations`."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm (over all adapters), above 0."""

    initial_loss_scale: float = Field(default=2.0**16, ge=1, le=2.0**24)
    """Factor of the loss in the backward pass of `model.dtype: float16`, at the start of the run: a power of two, 1 to 2^24.
    It keeps small gradients above float16's smallest number, and is divided out of the master weights' gradients. A backward
    pass that overflows is repeated with half the scale; after 100 steps without overflow the scale is doubled. No effect in
    the other data types."""

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

    tokens_per_pack: int | None = Field(default=None, ge=1)
    """Token budget of one forward and backward pass; affects peak memory, not the update. It is halved when memory runs out in
    training. None: 4096 on CPU; on CUDA as many as the memory plan has room for, from 2048 to 16384."""

    logits_mib: int | None = Field(default=None, ge=1)
    """Memory for the logits of one chunk, in MiB; a chunk has at least 16 tokens. None: 128 on CPU, 1024 on CUDA."""

    lora_kernel: Literal["auto", "triton", "cublas"] = "auto"
    """What multiplies with an adapter and its layer on CUDA: one kernel of `triton`, two products of `cublas`, or `auto`: the
    faster one for each shape, measured at the start (with `deterministic`, triton). They differ by rounding errors."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="before")
    @classmethod
    def _steps_before_epochs(cls, values: Any) -> Any:
        """Leaves at most one of `max_steps` and `num_train_epochs`: what determines the length of the run."""
        if not isinstance(values, dict):
            return values
        if values.get("max_steps", 0) in (None, -1, "-1"):
            values = {name: value for name, value in values.items() if name != "max_steps"}
        return {**values, "num_train_epochs": None} if "max_steps" in values and "num_train_epochs" in values else values

    @field_validator("initial_loss_scale")
    @classmethod
    def _is_power_of_two(cls, scale: float) -> float:
        if not math.log2(scale).is_integer():  # multiplying by any other number rounds
            raise ValueError(f"must be a power of two (got {scale:g})")
        return scale

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _parameters_of_the_schedule(cls, kwargs: dict[str, float | str], info: ValidationInfo) -> dict[str, float | str]:
        kind = info.data.get("lr_scheduler_type", "constant")
        check_schedule(kind, kwargs)
        return kwargs

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends_before_the_run(cls, warmup_steps: int, info: ValidationInfo) -> int:
        # With epochs the number of steps is not known yet.
        max_steps = info.data.get("max_steps", math.inf) if info.data.get("num_train_epochs") is None else math.inf
        if warmup_steps >= max_steps:
            raise ValueError(f"must be below optim.max_steps, which is {max_steps} (got {warmup_steps})")
        return warmup_steps

    @field_validator("warmup_ratio")
    @classmethod
    def _one_length_of_warmup(cls, warmup_ratio: float, info: ValidationInfo) -> float:
        if warmup_ratio and info.data.get("warmup_steps"):
            raise ValueError("optim.warmup_steps is set too: keep one of them")
        return warmup_ratio

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up, fewer than `max_steps`."""
        return self.warmup_steps or min(math.ceil(self.warmup_ratio * self.max_steps), self.max_steps - 1)


def check_schedule(kind: str, kwargs: dict[str, float | str]) -> None:
    """Raise ValueError if these are not parameters of the schedule."""
    known = SCHEDULES.get(kind, tuple(kwargs))
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(f"{kind} has {', '.join(known) or 'no parameters'} (got {name})")
        if name == "decay_type":
            if value not in DECAY_TYPES:
                raise ValueError(f"decay_type must be {', '.join(DECAY_TYPES)} (got {value!r})")
        elif not isinstance(value, float) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0 (got {value!r})")
    if kind == "cosine_with_min_lr" and ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        raise ValueError("cosine_with_min_lr needs one of min_lr and min_lr_rate")
    if kind == "warmup_stable_decay" and not kwargs.get("num_decay_steps"):
        raise ValueError("warmup_stable_decay needs num_decay_steps")
