"""The section `lora`: ranks, scales and targets of the adapter, and errors for PEFT options that are not supported.

Patterns and regular expressions have the same meaning as in PEFT. `model/adapters.py` checks that they match layers of the
model, once it is loaded.
"""

import math
import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from ...section import Section

TARGET_PRESETS = ("qkv", "attention", "all-linear")
"""The presets of `lora.targets`. What they mean depends on the model: `model/targets.py`."""

Init = Literal["default", "gaussian", "orthogonal"]


MAX_RANK = 128


def _fits_the_buffers(rank: int) -> int:
    if rank > MAX_RANK:
        raise ValueError(
            f"must be at most 128 (got {rank}): the adapter is stored in vLLM's buffers, which rankup allocates for rank 64 or "
            "128; higher ranks do not improve quality"
        )
    return rank


Rank = Annotated[int, Field(ge=1), AfterValidator(_fits_the_buffers)]


class LoraConfig(Section):
    """The adapter. Updates are `scaling * B @ A`, without dropout."""

    start_from: str | None = Field(default=None, min_length=1)
    """Adapter to start training from: a folder in PEFT's format, such as an earlier run's `adapter`, or an id on the Hub.
    `rank`, `alpha`, `use_rslora` and `targets` are taken from it unless they are set, and so are `rank_pattern` and
    `alpha_pattern` unless they or `rank` and `alpha` are set. If they differ, the adapter is converted to the same function:
    ranks can grow, smaller ones are raised to the adapter's, and further targets start at zero. None: a new adapter."""

    rank: Rank = 64
    """Rank of the update (PEFT's `r`), 1 to 128."""

    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale (PEFT's `lora_alpha`), above 0. With a fixed alpha, one learning rate works for all ranks."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Ranks of individual layers, 1 to 128: `{down_proj: 16, "layers.0.self_attn.*": 128}`. A key is the end of a module
    name or a regular expression for it, as in PEFT. No layer may match two keys with different values."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Alphas of individual layers, above 0; keys as in `rank_pattern`."""

    max_rank: Literal[64, 128] = Field(default=None, validate_default=True)
    """Rank of vLLM's buffers (vLLM's `max_lora_rank`), 64 or 128. None: the smallest that fits `rank` and `rank_pattern`."""

    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead of `alpha / rank` (rsLoRA, 2312.03732)."""

    targets: str | list[str] = "all-linear"
    """Layers with an adapter (PEFT's `target_modules`): `qkv` (input projections of attention and of other layers that mix
    tokens, whatever the model calls them), `attention` (and output projections), `all-linear` (and MLPs), a list of module
    names, which may name the `lm_head` and the input embedding (`embed_tokens`), or a regular expression that matches complete
    module names, such as `.*layers\\.(0|1)\\..*(q|v)_proj`. Presets leave out routers, experts, and layers on which vLLM
    cannot load an adapter (docs/models.md). Norm layers are not supported."""

    init_lora_weights: Init = "default"
    """Initialisation of A: `default` (PEFT's True: Kaiming-uniform), `gaussian`, or `orthogonal` (A and B orthogonal to each
    other, even ranks only). An adapter on the embedding always starts with A zero and B normal. PEFT's other methods are not
    supported: they change the base weights, which vLLM also uses (pissa, olora, corda, loftq), or need data (eva)."""

    dropout: float = Field(default=0.0, ge=0)
    """PEFT's `lora_dropout`. Must be 0: with dropout, the trained policy would no longer be the one that samples."""

    use_dora: bool = False
    """PEFT's DoRA. Must be false: vLLM cannot serve it."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_expressions(cls, pattern: dict[str, float]) -> dict[str, float]:
        for key in pattern:
            _check_expression(key, rf"(.*\.)?({key})$")  # how PEFT matches it
        return pattern

    @field_validator("max_rank", mode="before")
    @classmethod
    def _smallest_that_fits_the_ranks(cls, max_rank: object, info: ValidationInfo) -> object:
        rank, largest = _ranks(info)[0], max(_ranks(info))
        if max_rank is None:
            return 64 if largest <= 64 else 128
        if max_rank == 64 and largest > 64:
            what = f"lora.rank, which is {rank}" if rank > 64 else f"the largest rank in lora.rank_pattern, which is {largest}"
            raise ValueError(f"must be at least {what} (got 64); set 128 or leave it out")
        return max_rank

    @field_validator("targets", mode="before")
    @classmethod
    def _preset_names_or_expression(cls, targets: object) -> object:
        if isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
            return targets
        if isinstance(targets, str) and targets in TARGET_PRESETS:
            return targets
        # A plain word is more likely a mistyped preset than a regular expression for a module of that name.
        if isinstance(targets, str) and re.search(r"[.^$*+?{}\[\]\\|()]", targets):
            _check_expression(targets, targets)
            return targets
        raise ValueError(
            f"must be {', '.join(TARGET_PRESETS)}, a list of module names, or a regular expression that matches complete "
            f"module names (got {targets!r})"
        )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _base_weights_stay_unmodified(cls, init: object, info: ValidationInfo) -> object:
        init = "default" if init is True else init
        if init not in get_args(Init):
            raise ValueError(
                f"must be default, gaussian or orthogonal (got {init!r}): PEFT's other methods change the base weights, "
                "which vLLM also uses, or need data"
            )
        odd = [rank for rank in _ranks(info) if rank % 2]
        if init == "orthogonal" and odd:
            raise ValueError(f"must not be orthogonal with odd ranks, in lora.rank or lora.rank_pattern (got {odd[0]})")
        return init

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout > 0:
            raise ValueError(f"must be 0 (got {dropout}): with dropout, the trained policy is no longer the one that samples")
        return dropout

    @field_validator("use_dora")
    @classmethod
    def _no_dora(cls, use_dora: bool) -> bool:
        if use_dora:
            raise ValueError("must be false: vLLM cannot serve DoRA")
        return use_dora

    @property
    def scaling(self) -> float:
        """Factor of `B @ A` for layers without a pattern: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def _ranks(info: ValidationInfo) -> list[int]:
    """`rank`, then those of `rank_pattern`. A field with an error is absent here and reported separately."""
    return [info.data.get("rank", 2), *info.data.get("rank_pattern", {}).values()]


def _check_expression(text: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{text!r} is not a valid regular expression: {error.msg}") from None
