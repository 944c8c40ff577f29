"""The adapter's section of a run's configuration: ranks, scales, targets, and what PEFT offers that cannot be had here.

Patterns and expressions mean what they mean in PEFT; whether they name layers of the model is checked once there is one
(`adapters.py`).
"""

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from ...section import Section

ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGET_PRESETS: dict[str, list[str]] = {
    "qkv": ATTENTION_MODULES[:3],
    "attention": ATTENTION_MODULES,
    "all-linear": [*ATTENTION_MODULES, "gate_proj", "up_proj", "down_proj"],
}
"""What the names in `lora.targets` stand for."""

INITS = ("default", "gaussian", "orthogonal")


def _fits_the_buffers(rank: int) -> int:
    if rank > 128:
        raise ValueError(
            f"must be at most 128 (got {rank}): the adapter lives in vLLM's buffers, which are made for rank "
            "64 or 128 here, and quality does not rise beyond 128"
        )
    return rank


Rank = Annotated[int, Field(ge=1), AfterValidator(_fits_the_buffers)]


class LoraConfig(Section):
    """The adapter. Updates are `scaling * B @ A`; dropout is 0, or trainer and sampler would be two policies."""

    rank: Rank = 64
    """Rank of the update (PEFT's `r`), 1 to 128."""

    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale (PEFT's `lora_alpha`), above 0. A fixed alpha lets one learning rate serve all ranks."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some layers, 1 to 128: `{down_proj: 16, "layers.0.self_attn.*": 128}`. A key is the end of a module's
    name or a regular expression for it, as in PEFT. No layer should fit two keys that differ."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some layers, above 0; keys as in `rank_pattern`."""

    max_rank: Literal[64, 128] = Field(default=None, validate_default=True)
    """Rank that vLLM's buffers are made for (vLLM's `max_lora_rank`), 64 or 128. None: the smallest that holds `rank`
    and `rank_pattern`."""

    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` in place of `alpha / rank` (rsLoRA, 2312.03732)."""

    targets: str | list[str] = "all-linear"
    """Layers with an adapter (PEFT's `target_modules`): `qkv`, `attention` (and o_proj), `all-linear` (and gate_proj,
    up_proj, down_proj), a list of module names, which may name the `lm_head` and the input embedding (`embed_tokens`), or a
    regular expression that a module's whole name fits, such as `.*layers\\.(0|1)\\..*(q|v)_proj`. Norm layers are refused."""

    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = "default"
    """How A begins: `default` (PEFT's True: Kaiming-uniform), `gaussian`, or `orthogonal` (A and B orthogonal to each
    other, even ranks). On the embedding A begins at zero and B normal, with all three. PEFT's others are refused: they
    change the base weights, so that vLLM's base would be another (pissa, olora, corda, loftq), or need data first (eva)."""

    dropout: float = Field(default=0.0, ge=0)
    """PEFT's `lora_dropout`. Only 0: with dropout, trainer and sampler would be two policies."""

    use_dora: bool = False
    """PEFT's DoRA. Only false: vLLM cannot serve it."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_expressions(cls, pattern: dict[str, float]) -> dict[str, float]:
        for key in pattern:
            _check_expression(key, rf"(.*\.)?({key})$")  # what PEFT makes of it
        return pattern

    @field_validator("max_rank", mode="before")
    @classmethod
    def _smallest_that_holds_the_ranks(cls, max_rank: object, info: ValidationInfo) -> object:
        rank, largest = _ranks(info)[0], max(_ranks(info))
        if max_rank is None:
            return 64 if largest <= 64 else 128
        if max_rank == 64 and largest > 64:
            what = f"lora.rank, which is {rank}" if rank > 64 else f"lora.rank_pattern, which goes up to {largest}"
            raise ValueError(f"must hold {what} (got 64); write 128 or leave it out")
        return max_rank

    @field_validator("targets", mode="before")
    @classmethod
    def _preset_names_or_expression(cls, targets: object) -> object:
        if isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
            return targets
        if isinstance(targets, str) and targets in TARGET_PRESETS:
            return targets
        # A plain word is more likely a preset that was mistyped than an expression for a module of that whole name.
        if isinstance(targets, str) and re.search(r"[.^$*+?{}\[\]\\|()]", targets):
            _check_expression(targets, targets)
            return targets
        raise ValueError(
            f"must be {', '.join(TARGET_PRESETS)}, a list of module names, or a regular expression that whole module "
            f"names fit (got {targets!r})"
        )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _leaves_the_base_as_it_is(cls, init: object, info: ValidationInfo) -> object:
        init = "default" if init is True else init
        if init not in INITS:
            raise ValueError(
                f"must be {', '.join(INITS[:-1])} or {INITS[-1]} (got {init!r}): PEFT's other ways to begin change the "
                "base weights, so that vLLM's base would be another model, or need data first"
            )
        odd = [rank for rank in _ranks(info) if rank % 2]
        if init == "orthogonal" and odd:
            raise ValueError(f"must not be orthogonal with odd ranks, in lora.rank or lora.rank_pattern (got {odd[0]})")
        return init

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout > 0:
            raise ValueError(f"must be 0 (got {dropout}): with dropout, trainer and sampler would be two policies")
        return dropout

    @field_validator("use_dora")
    @classmethod
    def _no_dora(cls, use_dora: bool) -> bool:
        if use_dora:
            raise ValueError("must be false: vLLM cannot serve DoRA")
        return use_dora

    @property
    def scaling(self) -> float:
        """Factor of `B @ A` where no pattern says otherwise: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def target_modules(self) -> list[str] | str:
        """`targets` as PEFT takes them: module names, or one expression for whole names."""
        if isinstance(self.targets, str):
            return list(TARGET_PRESETS[self.targets]) if self.targets in TARGET_PRESETS else self.targets
        return list(self.targets)


def _ranks(info: ValidationInfo) -> list[int]:
    """`rank`, then those of `rank_pattern`. What is wrong itself is absent, and reported there."""
    return [info.data.get("rank", 2), *info.data.get("rank_pattern", {}).values()]


def _check_expression(text: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error.msg}") from None
