"""The sections `algorithm` (the objective) and `correction` (importance weights for the sampler's rounding). Imports no torch.

`loss_type` selects an objective as its paper defines it, and with it the defaults of several options. An option that is set
explicitly takes precedence, so all parts can be combined freely.

    AlgorithmConfig(loss_type="gspo").importance_sampling_level        # "sequence"
    AlgorithmConfig(loss_type="grpo", epsilon_high=0.28).epsilon       # 0.2
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...section import Section
from .functions import UserFunction, check_name_or_spec, text_of

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_aggregation": "sequence_mean", "epsilon_high": 0.2},
    "dapo": {},
    "dr_grpo": {"loss_aggregation": "constant", "epsilon_high": 0.2, "scale_rewards": "none"},
    "bnpo": {"loss_aggregation": "local_token_mean", "epsilon_high": 0.2},
    "gspo": {
        "loss_aggregation": "sequence_mean",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "cispo": {"epsilon_high": 5.0},
    "sapo": {"loss_aggregation": "sequence_mean"},
    "rloo": {
        "loss_aggregation": "constant",
        "advantage_estimator": "rloo",
        "scale_rewards": "none",
        "epsilon_high": 0.2,
    },
    "reinforce_pp": {"advantage_estimator": "reinforce_pp", "scale_rewards": "batch", "epsilon_high": 0.2},
    "maxrl": {"advantage_estimator": "maxrl", "scale_rewards": "none", "epsilon_high": 0.2},
}
"""The defaults in which each objective differs from `COMMON`, which has the values of DAPO."""

ESTIMATORS = ("group", "rloo", "reinforce_pp", "maxrl")
"""The built-in values of `advantage_estimator`."""

COMMON: dict[str, Any] = {
    "advantage_estimator": "group",
    "scale_rewards": "group",
    "loss_aggregation": "token_mean",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
}


class AlgorithmConfig(Section):
    """The objective."""

    loss_type: UserFunction = "dapo"
    """The objective: `grpo` (2402.03300), `dapo` (2503.14476), `dr_grpo` (2503.20783), `bnpo`, `gspo` (2507.18071), `cispo`
    (2506.13585), `sapo` (2511.20347), `rloo` (2402.14740), `reinforce_pp` (2501.03262), `maxrl` (2602.02710), or a
    function from `LossInputs` to one loss per token: `path/to/file.py:name` or `package.module:name`, in Python also the
    function itself (docs/extending.md). It selects the defaults of the next options."""

    advantage_estimator: UserFunction = Field(default=None, validate_default=True)
    """Baseline that is subtracted from a reward: `group` (mean of the group), `rloo` (mean of the other completions in the
    group), `reinforce_pp` (mean of the batch), `maxrl` (mean of the group, which also divides); or a function from the groups
    of a step to their final advantages, given as for `loss_type`. None: that of `loss_type`."""

    scale_rewards: Literal["group", "batch", "none"] = Field(default=None, validate_default=True)
    """Standard deviation that divides advantages: of the `group`, of the `batch` (2508.08221), or `none` (2503.20783); not
    for advantages of a function. None: that of `loss_type`, usually `group`."""

    loss_aggregation: Literal["token_mean", "local_token_mean", "sequence_mean", "constant"] = Field(
        default=None, validate_default=True
    )
    """How the losses of tokens are aggregated: mean over all tokens of the step (`token_mean`), mean over the tokens of each
    worker, then over workers (`local_token_mean`), mean over each completion first (`sequence_mean`), or sum divided by
    completions times `rollout.max_completion_length` (`constant`). None: that of `loss_type`."""

    importance_sampling_level: Literal["token", "sequence"] = Field(default=None, validate_default=True)
    """One probability ratio per `token`, or one per `sequence`, the geometric mean of its tokens' ratios (GSPO). None: that of
    `loss_type`."""

    epsilon: float = Field(default=None, validate_default=True, ge=0, le=1)
    """Lower clip: ratios below `1 - epsilon` are clipped, [0, 1]. None: that of `loss_type`, usually 0.2."""

    epsilon_high: float = Field(default=None, validate_default=True, ge=0)
    """Upper clip: ratios above `1 + epsilon_high` are clipped, at least 0; for `cispo` the cap itself, as in TRL. None: that of
    `loss_type`: 0.28 for dapo (clip-higher), 5 for cispo, 4e-4 for gspo, else 0.2."""

    delta: float | None = Field(default=None, gt=0)
    """Two-sided clip (2505.07291): ratios are capped at this value, which bounds the loss of tokens with a negative advantage;
    above `1 + epsilon_high`. None: off."""

    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """Temperature of SAPO's gate for tokens with a positive advantage, above 0."""

    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """Temperature of SAPO's gate for all other tokens, above 0."""

    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty to the reference policy (k3 estimator), at least 0. At 0 its forward pass is skipped."""

    reference: Literal["start", "base"] = "start"
    """Reference policy of the KL penalty: `start`, the policy that training started from, or `base`, the base model. They
    differ only with `lora.start_from`."""

    use_bias_correction_kl: bool = False
    """Multiply the KL penalty by the probability ratio, which makes its gradient that of the reverse KL (DeepSeek-V3.2,
    2512.02556; TRL's default)."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus: this times the mean entropy of all trained tokens is added to the maximised objective."""

    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Train only on this share of the step's tokens, those with the highest entropy (2506.01939), (0, 1]. Below 1, each step
    needs another forward pass to find the threshold, which is the same for all iterations of the step."""

    mask_truncated_completions: bool = False
    """Exclude completions that reached the limit of tokens, or of turns, from the loss (DAPO's overlong filtering)."""

    off_policy_mask_threshold: float | None = Field(default=None, gt=0)
    """Exclude completions with a negative advantage whose log-probability per token has fallen by more than this since they
    were sampled, in nats, on average (DeepSeek-V3.2, 2512.02556). None: off."""

    soft_overlong_tokens: int = Field(default=0, ge=0)
    """Completions within this many tokens of `rollout.max_completion_length` get a penalty on their reward that grows linearly
    from 0 to 1 (DAPO's soft overlong punishment). 0: off."""

    filter_zero_variance: bool = True
    """Exclude groups whose advantages are all zero from the loss and from its means (DAPO). False: they count in the means, as
    in TRL (with `constant` they always do). With a KL penalty or an entropy bonus they are kept, since they have a gradient."""

    max_resampling_rounds: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO): while fewer than `optim.prompts_per_step` groups have reward variance, sample further prompts,
    drawn at random, at most this many times per step; then train only on groups with variance. 0: off."""

    group_filter: UserFunction | None = None
    """A function from a group with advantages to whether it is trained on, given as for `loss_type`. Dynamic sampling replaces
    rejected groups as it does those without variance. The metric `filtered_ratio` is their share. None: all are."""

    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of completions (mu in the GRPO paper). 1 is fully on-policy."""

    @model_validator(mode="before")
    @classmethod
    def _none_is_not_set(cls, values: Any) -> Any:
        return _without_none(values, COMMON)

    @field_validator(*COMMON, mode="before")
    @classmethod
    def _default_of_the_objective(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        if value is None:
            loss_type = info.data.get("loss_type")
            preset = OBJECTIVES.get(loss_type, {}) if isinstance(loss_type, str) else {}
            return preset.get(info.field_name, COMMON[info.field_name])
        if info.field_name == "scale_rewards" and _is_custom(info.data.get("advantage_estimator"), ESTIMATORS):
            raise ValueError("has no effect on the advantages of your own algorithm.advantage_estimator: leave it out")
        if info.field_name == "scale_rewards" and isinstance(value, bool):  # TRL also takes a bool
            return "group" if value else "none"
        return value

    @field_validator("loss_type")
    @classmethod
    def _built_in_or_your_loss(cls, value: UserFunction) -> UserFunction:
        check_name_or_spec(value, OBJECTIVES)
        return value

    @field_validator("advantage_estimator")
    @classmethod
    def _built_in_or_your_advantages(cls, value: UserFunction) -> UserFunction:
        check_name_or_spec(value, ESTIMATORS)
        return value

    @field_validator("group_filter")
    @classmethod
    def _your_filter(cls, value: UserFunction | None) -> UserFunction | None:
        if value is not None:
            check_name_or_spec(value)
        return value

    @field_validator("delta")
    @classmethod
    def _above_the_upper_clip(cls, delta: float | None, info: ValidationInfo) -> float | None:
        if delta is not None and info.data.get("loss_type") in ("cispo", "sapo"):
            raise ValueError(f"has no effect with {info.data['loss_type']}, which does not use this clip: leave it out")
        epsilon_high = info.data.get("epsilon_high", 0.0)
        if delta is not None and delta <= 1.0 + epsilon_high:
            raise ValueError(f"must be above 1 + algorithm.epsilon_high, which is {1 + epsilon_high:g} (got {delta:g})")
        return delta

    @property
    def custom_loss(self) -> UserFunction | None:
        """`loss_type` if it is a user-supplied function; None for a built-in objective."""
        return self.loss_type if _is_custom(self.loss_type, OBJECTIVES) else None

    @property
    def custom_advantages(self) -> UserFunction | None:
        """`advantage_estimator` if it is a user-supplied function; None for a built-in estimator."""
        return self.advantage_estimator if _is_custom(self.advantage_estimator, ESTIMATORS) else None

    @property
    def estimator_name(self) -> str:
        """`advantage_estimator` as text, for messages."""
        return text_of(self.advantage_estimator)

    @property
    def needs_every_group(self) -> bool:
        """Whether groups whose advantages are all zero still have a gradient."""
        return self.beta > 0 or self.entropy_coef != 0


def _without_none(values: Any, names: Iterable[str]) -> Any:
    """The values of a section without None for these options, which a dump has for defaults that depend on another option.

    Otherwise they would count as set once the dump is read back.
    """
    return {name: v for name, v in values.items() if v is not None or name not in names} if isinstance(values, dict) else values


def _is_custom(value: UserFunction | None, names: Iterable[str]) -> bool:
    """Whether the value of an option is a function or its spec, and none of the names."""
    return value is not None and not (isinstance(value, str) and value in names)


TRL_SWITCH = "vllm_importance_sampling_correction"

CorrectionMode = Literal["none", "token_truncate", "token_mask", "icepop", "sequence_truncate", "sequence_mask"]
CORRECTION_MODES = get_args(CorrectionMode)


class CorrectionConfig(Section):
    """Importance weights for the mismatch between sampler and trainer, which round differently: the loss of each token (or
    completion) is multiplied by w = exp(log-probability in the trainer - log-probability in the sampler), limited by `mode`."""

    mode: CorrectionMode = "token_truncate"
    """`token_truncate`: min(w, cap), truncated importance sampling. `token_mask`: 0 above `cap`. `icepop`: 0 outside [floor,
    cap] (2510.18855). `sequence_truncate`, `sequence_mask`: the same for the geometric mean of w over a completion, which does
    not shrink with its length. `none`: no weights."""

    cap: float = Field(default=None, validate_default=True, gt=0)
    """Largest weight, above 0. None: 2, or 5 with icepop."""

    floor: float = Field(default=0.5, ge=0, validate_default=True)
    """Smallest weight that icepop does not mask, below `cap`."""

    veto: float = Field(default=None, validate_default=True, ge=0, lt=1)
    """Completions with any token of smaller weight are excluded: the trainer gives the sampled token almost no probability.
    0: off. None: 1e-4, or 0 if `mode` is none."""

    @model_validator(mode="before")
    @classmethod
    def _switch_and_mode_of_trl(cls, values: Any) -> Any:
        """TRL's `vllm_importance_sampling_correction` turns the correction off whatever the mode; if on, the mode decides."""
        values = _without_none(values, ("cap", "veto"))
        if not (isinstance(values, dict) and TRL_SWITCH in values):
            return values
        rest = {key: value for key, value in values.items() if key != TRL_SWITCH}
        switch = values[TRL_SWITCH]
        if not isinstance(switch, bool):
            if "mode" in rest:
                raise ValueError(f"{TRL_SWITCH} must be true or false when a mode is set too (got {switch!r})")
            return {**rest, "mode": switch}
        is_valid = rest.get("mode", "none") in CORRECTION_MODES  # a mistyped mode is reported even if the switch is off
        return {**rest, "mode": "none"} if is_valid and not switch else rest

    @field_validator("mode", mode="before")
    @classmethod
    def _accepts_a_bool(cls, mode: object) -> object:
        return {True: "token_truncate", False: "none"}[mode] if isinstance(mode, bool) else mode

    @field_validator("cap", "veto", mode="before")
    @classmethod
    def _default_of_the_mode(cls, value: object, info: ValidationInfo) -> object:
        if value is not None:
            return value
        mode = info.data.get("mode")
        if info.field_name == "cap":
            return 5.0 if mode == "icepop" else 2.0
        return 0.0 if mode == "none" else 1e-4

    @field_validator("floor")
    @classmethod
    def _below_the_cap(cls, floor: float, info: ValidationInfo) -> float:
        if info.data.get("mode") == "icepop" and floor >= info.data.get("cap", float("inf")):
            raise ValueError(f"must be below correction.cap, which is {info.data['cap']:g} (got {floor:g})")
        return floor
