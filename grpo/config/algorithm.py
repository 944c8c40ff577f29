"""What is optimised: the objective's section of a run's configuration, and that of the correction for the sampler.

`loss_type` names an objective as its paper has it. It brings its own values for the options that it decides; an option that
is given wins, so that every part can be combined with every other.

    AlgorithmConfig(loss_type="gspo").importance_sampling_level        # "sequence"
    AlgorithmConfig(loss_type="grpo", epsilon_high=0.28).epsilon       # 0.2
"""

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...section import Section

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
"""What each objective decides differently from DAPO, whose values are those of `COMMON`."""

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

    loss_type: str = "dapo"
    """The objective: `grpo` (2402.03300), `dapo` (2503.14476), `dr_grpo` (2503.20783), `bnpo`, `gspo` (2507.18071), `cispo`
    (2506.13585), `sapo` (2511.20347), `rloo` (2402.14740), `reinforce_pp` (2501.03262), `maxrl` (2602.02710), or a function
    of your own, `path/to/file.py:name` or `package.module:name`, see `rankup.grpo.algorithm.losses`. It decides the defaults of
    the next options."""

    advantage_estimator: Literal["group", "rloo", "reinforce_pp", "maxrl"] = Field(default=None, validate_default=True)
    """What a reward is compared with: `group` (the group's mean), `rloo` (the mean of the group's others), `reinforce_pp`
    (the batch's mean), `maxrl` (the group's mean, which also divides). None: the objective's."""

    scale_rewards: Literal["group", "batch", "none"] = Field(default=None, validate_default=True)
    """Standard deviation that divides advantages: the group's, the batch's (2508.08221), or none (2503.20783). None: the
    objective's, mostly `group`."""

    loss_aggregation: Literal["token_mean", "local_token_mean", "sequence_mean", "constant"] = Field(
        default=None, validate_default=True
    )
    """How tokens add up to the loss: their mean over the step (`token_mean`), over this device's share of the step
    (`local_token_mean`), each completion's mean first (`sequence_mean`), or their sum over completions times
    `rollout.max_completion_length` (`constant`). None: the objective's."""

    importance_sampling_level: Literal["token", "sequence"] = Field(default=None, validate_default=True)
    """One ratio a `token`, or one a `sequence`: the geometric mean of its tokens' (GSPO). None: the objective's."""

    epsilon: float = Field(default=None, validate_default=True, ge=0, le=1)
    """Lower clip: ratios below `1 - epsilon` are clipped, [0, 1]. None: the objective's, mostly 0.2."""

    epsilon_high: float = Field(default=None, validate_default=True, ge=0)
    """Upper clip: ratios above `1 + epsilon_high` are clipped, at least 0; of `cispo` the cap itself, as in TRL. None: the
    objective's: 0.28 (DAPO's clip-higher), 5 for cispo, mostly 0.2."""

    delta: float | None = Field(default=None, gt=0)
    """Two-sided clip (2505.07291): no ratio counts as more than this, which bounds what a negative advantage can do; above
    `1 + epsilon_high`. None: off."""

    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """Steepness of SAPO's gate where the advantage is positive, above 0."""

    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """Steepness of SAPO's gate elsewhere, above 0."""

    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty to the base model (k3 estimator), at least 0. At 0 the base model is not evaluated."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the mean entropy of all trained tokens times this is added to what is maximised."""

    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Train on this share of the step's tokens, those of highest entropy (2506.01939), (0, 1]. Below 1 it takes one more
    forward pass a step, to find the bound, which holds for all of the step's iterations."""

    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss (DAPO's overlong filtering)."""

    off_policy_mask_threshold: float | None = Field(default=None, gt=0)
    """Leave out completions with a negative advantage whose tokens have become less likely than when they were sampled by
    more than this in the mean (DeepSeek-V3.2, 2512.02556), in nats. None: off."""

    soft_overlong_tokens: int = Field(default=0, ge=0)
    """Completions within so many tokens of `rollout.max_completion_length` lose reward, linearly from 0 to 1 (DAPO's soft
    overlong punishment). 0: off."""

    filter_zero_variance: bool = True
    """Leave groups whose advantages are all zero out of the loss and of its means (DAPO). False: they count in the means, as
    in TRL (with `constant` they always do). Where a KL penalty or an entropy bonus has something to say about them, they
    stay."""

    max_resampling_rounds: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO): while groups without variance leave fewer than `optim.prompts_per_step`, sample further
    prompts, drawn at random, at most so many times a step; then only groups with variance are trained on. 0: off."""

    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of completions (mu in the GRPO paper). 1 is fully on-policy."""

    @field_validator("loss_type")
    @classmethod
    def _named_or_your_own(cls, loss_type: str) -> str:
        if loss_type in OBJECTIVES or re.fullmatch(r".+:[A-Za-z_]\w*", loss_type):
            return loss_type
        raise ValueError(
            f"must be {', '.join(OBJECTIVES)}, or a function of your own, path/to/file.py:name (got {loss_type!r})"
        )

    @field_validator(*COMMON, mode="before")
    @classmethod
    def _the_objective_decides(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name == "scale_rewards" and isinstance(value, bool):  # TRL also takes a bool
            return "group" if value else "none"
        assert info.field_name is not None
        if value is not None:
            return value
        return OBJECTIVES.get(info.data.get("loss_type", ""), {}).get(info.field_name, COMMON[info.field_name])

    @field_validator("delta")
    @classmethod
    def _above_the_upper_clip(cls, delta: float | None, info: ValidationInfo) -> float | None:
        if delta is not None and info.data.get("loss_type") in ("cispo", "sapo"):
            raise ValueError(f"has no effect on {info.data['loss_type']}, which does not clip so: leave it out")
        epsilon_high = info.data.get("epsilon_high", 0.0)
        if delta is not None and delta <= 1.0 + epsilon_high:
            raise ValueError(f"must be above 1 + algorithm.epsilon_high, which is {1 + epsilon_high:g} (got {delta:g})")
        return delta

    @property
    def own_loss(self) -> str | None:
        """Where the user's own objective is, None for one of ours."""
        return None if self.loss_type in OBJECTIVES else self.loss_type

    @property
    def needs_every_group(self) -> bool:
        """Whether a group whose advantages are all zero still has a gradient."""
        return self.beta > 0 or self.entropy_coef != 0


TRL_SWITCH = "vllm_importance_sampling_correction"

CORRECTION_MODES = ("none", "token_truncate", "token_mask", "icepop", "sequence_truncate", "sequence_mask")


class CorrectionConfig(Section):
    """The gap between the policy that samples and the one that is trained, which rounding makes two: each token's (or
    completion's) loss is weighed by w = exp(trainer's log-probability - sampler's)."""

    mode: Literal["none", "token_truncate", "token_mask", "icepop", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """`token_truncate`: min(w, cap), truncated importance sampling. `token_mask`: 0 above `cap`. `icepop`: 0 outside [floor,
    cap] (2510.18855). `sequence_truncate`, `sequence_mask`: the same for a completion's geometric mean of w, which does not
    decay with its length. `none`: no weight."""

    cap: float = Field(default=None, validate_default=True, gt=0)
    """Largest weight, above 0. None: 2, with icepop 5."""

    floor: float = Field(default=0.5, ge=0, validate_default=True)
    """Smallest weight that icepop lets pass, below `cap`."""

    veto: float = Field(default=None, validate_default=True, ge=0, lt=1)
    """A completion with a token of smaller weight is left out: the sampler drew what the trainer finds impossible. 0: off.
    None: 1e-4, and 0 where `mode` is none."""

    @model_validator(mode="before")
    @classmethod
    def _trl_has_a_switch_and_a_mode(cls, values: Any) -> Any:
        """TRL's `vllm_importance_sampling_correction` turns the correction off whatever the mode; if on, the mode decides."""
        if not (isinstance(values, dict) and TRL_SWITCH in values):
            return values
        rest = {key: value for key, value in values.items() if key != TRL_SWITCH}
        switch = values[TRL_SWITCH]
        if not isinstance(switch, bool):
            if "mode" in rest:
                raise ValueError(f"{TRL_SWITCH} must be true or false when a mode is given too (got {switch!r})")
            return {**rest, "mode": switch}
        is_valid = rest.get("mode", "none") in CORRECTION_MODES  # a mistyped mode is reported even if the switch is off
        return {**rest, "mode": "none"} if is_valid and not switch else rest

    @field_validator("mode", mode="before")
    @classmethod
    def _accepts_a_bool(cls, mode: object) -> object:
        return {True: "token_truncate", False: "none"}[mode] if isinstance(mode, bool) else mode

    @field_validator("cap", "veto", mode="before")
    @classmethod
    def _the_mode_decides(cls, value: object, info: ValidationInfo) -> object:
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
