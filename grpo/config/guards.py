"""The section `guards`: limits of the alarms, and the actions that a run may take when they trigger.

    guards = GuardsConfig(entropy_stop=None, restore=False)   # no hard limit for entropy; the policy is never restored
    guards.limits("entropy")                                  # (0.5, None)

`guards.py` defines the alarms and their actions. Nothing here imports torch.
"""

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...section import Section

LOW_IS_BAD = ("effective_sample_size", "entropy")
"""Alarms that trigger when their value falls below a limit; all others trigger above."""


class GuardsConfig(Section):
    """Alarms and their actions. `<alarm>_watch` is the soft limit of an alarm and `<alarm>_stop` its hard limit; None turns
    a limit off."""

    enabled: bool = True
    """Use guards. False: no alarms and no actions, except that an update with a non-finite gradient is always skipped, and
    `max_consecutive_skips` of them in a row end the run."""

    skip: bool = True
    """Skip an update whose batch is above a hard limit (sampler mismatch, gradient norm). An update with a non-finite gradient
    is skipped in any case."""

    halve: bool = True
    """Halve the learning rate for the rest of the run, after two alarms within `window_steps` and with every restore."""

    restore: bool = True
    """Restore the last healthy adapter and optimizer state, after three alarms within `window_steps` or when the policy is
    above a hard limit. Needs host memory for one copy of both (12 bytes per adapter parameter), for two with
    `logging.eval_steps`."""

    load_best_model_at_end: bool = False
    """End with the adapter of the best evaluation, even if noise explains why the last one is lower. Needs
    `logging.eval_steps`. False: only after a decline beyond noise, see `evaluation_watch`."""

    sampler_kl_watch: float | None = Field(default=0.01, ge=0)
    """KL divergence between sampler and trainer per token (k3 estimator); must also exceed twice its baseline."""

    sampler_kl_stop: float | None = Field(default=0.1, ge=0)
    """Hard limit: the update is skipped."""

    sampler_ratio_watch: float | None = Field(default=1.05, ge=1)
    """Mean of exp(abs(log-probability difference)) of trainer and sampler; its excess over 1 must also exceed 1.5 times that
    of its baseline."""

    sampler_ratio_stop: float | None = Field(default=1.2, ge=1)
    """Hard limit: the update is skipped."""

    effective_sample_size_watch: float | None = Field(default=0.5, ge=0, le=1)
    """Effective sample size of the importance weights as a share of the sample, [0, 1]; triggers below."""

    effective_sample_size_stop: float | None = Field(default=0.3, ge=0, le=1)
    """Hard limit: the update is skipped."""

    grad_norm_watch: float | None = Field(default=3.0, ge=1)
    """Gradient norm over its running geometric mean; must also exceed 4 standard deviations of its logarithm."""

    grad_norm_stop: float | None = Field(default=5.0, ge=1)
    """Hard limit: above it and 5 standard deviations of its logarithm, or not finite, the update is skipped."""

    entropy_watch: float | None = Field(default=0.5, ge=0)
    """Mean token entropy over its baseline; triggers below. Ignored while the reward is at its best."""

    entropy_stop: float | None = Field(default=0.1, ge=0)
    """Hard limit: the policy is restored."""

    advantage_scale_watch: float | None = Field(default=3.0, ge=0)
    """Scale of the advantages before normalisation, over its baseline. Ignored while the reward is at its best."""

    advantage_scale_stop: float | None = Field(default=None, ge=0)
    """Hard limit: the policy is restored."""

    length_watch: float | None = Field(default=2.0, ge=0)
    """Mean completion length over its baseline."""

    length_stop: float | None = Field(default=None, ge=0)
    """Hard limit: the policy is restored."""

    reward_watch: float | None = Field(default=0.15, ge=0)
    """Share of the reward gain that was lost again, minus what noise explains; relative to the baseline if there was no
    gain."""

    reward_stop: float | None = Field(default=0.3, ge=0)
    """Hard limit: the policy is restored."""

    evaluation_watch: float | None = Field(default=0.15, ge=0)
    """The same share for evaluation rewards in a run with `logging.eval_steps`, minus 2 standard errors or more. Such a run
    also ends with the adapter of the best evaluation if the last one lost more than 0.05 of the gain and a standard
    error."""

    evaluation_stop: float | None = Field(default=0.3, ge=0)
    """Hard limit: the policy of the best evaluation is restored."""

    zero_variance_watch: float | None = Field(default=0.8, ge=0, le=1)
    """Share of groups with zero reward variance, [0, 1], averaged over about 20 steps. Shown as advice, without an action."""

    baseline_steps: int = Field(default=5, ge=2)
    """Number of first steps, at least 2, whose mean is the baseline. Alarms relative to it cannot trigger earlier."""

    window_steps: int = Field(default=20, ge=1)
    """Number of steps over which alarms are counted."""

    snapshot_steps: int = Field(default=5, ge=1)
    """Minimum number of steps between two snapshots of adapter and optimizer state."""

    max_consecutive_skips: int = Field(default=10, ge=1)
    """The run stops after this many skipped updates in a row."""

    max_restores: int = Field(default=4, ge=1)
    """The run stops when the same snapshot would be restored more often than this without recovering."""

    min_learning_rate_factor: float = Field(default=1 / 16, gt=0, le=1)
    """Smallest factor on the scheduled learning rate that halving may reach, (0, 1]."""

    @model_validator(mode="after")
    def _the_best_is_kept_by_restoring(self) -> "GuardsConfig":
        if self.load_best_model_at_end and not (self.enabled and self.restore):
            raise ValueError("load_best_model_at_end restores a snapshot: needs guards.enabled and guards.restore")
        return self

    @field_validator("*")
    @classmethod
    def _hard_limit_is_beyond_the_soft_one(cls, stop: object, info: ValidationInfo) -> object:
        name, _, which = (info.field_name or "").rpartition("_")
        watch = info.data.get(f"{name}_watch")
        if which != "stop" or not isinstance(stop, float) or watch is None:
            return stop
        side, is_wrong = ("above", stop > watch) if name in LOW_IS_BAD else ("below", stop < watch)
        if is_wrong:
            raise ValueError(f"must not be {side} guards.{name}_watch, which is {watch:g} (got {stop:g})")
        return stop

    def limits(self, alarm: str) -> tuple[float | None, float | None]:
        """The soft and the hard limit of an alarm; None for a limit that is off."""
        return getattr(self, f"{alarm}_watch"), getattr(self, f"{alarm}_stop", None)
