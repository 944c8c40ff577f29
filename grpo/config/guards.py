"""The section `guards` of a run's configuration: limits of the alarms, and what a run may do when they ring.

    guards = GuardsConfig(entropy_stop=None, restore=False)   # entropy never stops; nothing is ever taken back
    guards.limits("entropy")                                  # (0.5, None)

What the alarms measure and what follows from them stands in `guards.py`. Nothing here imports torch.
"""

from pydantic import Field, ValidationInfo, field_validator

from ...section import Section

LOW_IS_BAD = ("effective_sample_size", "entropy")
"""Alarms whose value is bad below its limits; all others are above them."""


class GuardsConfig(Section):
    """Alarms, and what they do. `<alarm>_watch` and `<alarm>_stop` are limits; None switches a limit off."""

    enabled: bool = True
    """Watch the run. False: no alarms, and no actions but these: a gradient that is not finite is never applied, and
    `max_consecutive_skips` of them in a row end the run."""

    skip: bool = True
    """Leave out an update whose batch is beyond a stop limit (the sampler's gap, the gradient's norm). A gradient that is not
    finite is left out in any case."""

    halve: bool = True
    """Halve the learning rate for the rest of the run: two alarms within `window_steps`, or before any restore."""

    restore: bool = True
    """Go back to the last healthy adapter and optimizer: three alarms within `window_steps`, or a policy beyond a stop
    limit. Needs host memory for one copy of both (12 bytes an adapter parameter), for two with `logging.eval_steps`."""

    sampler_kl_watch: float | None = Field(default=0.01, ge=0)
    """KL divergence of sampler to trainer (k3 estimator), per token; and twice its start."""

    sampler_kl_stop: float | None = Field(default=0.1, ge=0)
    """Beyond it the update is skipped."""

    sampler_ratio_watch: float | None = Field(default=1.05, ge=1)
    """Mean of exp(|difference of log-probability|), trainer and sampler; and 1.5 times its start, both less 1."""

    sampler_ratio_stop: float | None = Field(default=1.2, ge=1)
    """Beyond it the update is skipped."""

    effective_sample_size_watch: float | None = Field(default=0.5, ge=0, le=1)
    """Effective sample size of the importance weights as a share of the sample, [0, 1]; bad below."""

    effective_sample_size_stop: float | None = Field(default=0.3, ge=0, le=1)
    """Beyond it the update is skipped."""

    grad_norm_watch: float | None = Field(default=3.0, ge=1)
    """Gradient norm over its running mean (geometric); and 4 standard deviations of its logarithm."""

    grad_norm_stop: float | None = Field(default=5.0, ge=1)
    """Beyond it, and 5 standard deviations of its logarithm, or not finite: the update is skipped."""

    entropy_watch: float | None = Field(default=0.5, ge=0)
    """Mean entropy of a token over its start; bad below. Not judged while the reward is at its best."""

    entropy_stop: float | None = Field(default=0.1, ge=0)
    """Beyond it the policy is restored."""

    advantage_scale_watch: float | None = Field(default=3.0, ge=0)
    """Scale of the advantages before they are normalised, over its start. Not judged while the reward is at its best."""

    advantage_scale_stop: float | None = Field(default=None, ge=0)
    """Beyond it the policy is restored."""

    length_watch: float | None = Field(default=2.0, ge=0)
    """Mean length of the completions over its start."""

    length_stop: float | None = Field(default=None, ge=0)
    """Beyond it the policy is restored."""

    reward_watch: float | None = Field(default=0.15, ge=0)
    """Share of the reward's gain that is lost again, less what noise explains; of its start, where nothing was gained."""

    reward_stop: float | None = Field(default=0.3, ge=0)
    """Beyond it the policy is restored."""

    evaluation_watch: float | None = Field(default=0.15, ge=0)
    """The same share of what was gained in the evaluations of a run with `logging.eval_steps`, less 2 standard errors or more.
    There the run also ends with the best evaluation's adapter, if the last one has lost more than 0.05 and a standard error."""

    evaluation_stop: float | None = Field(default=0.3, ge=0)
    """Beyond it the policy is restored: the best evaluation's."""

    zero_variance_watch: float | None = Field(default=0.8, ge=0, le=1)
    """Share of groups without variance, [0, 1], in the mean of some 20 steps. Advice: it is shown and nothing follows."""

    baseline_steps: int = Field(default=5, ge=2)
    """First steps, at least 2, whose mean is a quantity's start. What is compared with the start is not judged before."""

    window_steps: int = Field(default=20, ge=1)
    """Steps within which alarms add up."""

    snapshot_steps: int = Field(default=5, ge=1)
    """Least number of steps between two snapshots of adapter and optimizer."""

    max_consecutive_skips: int = Field(default=10, ge=1)
    """The run stops after so many skipped updates in a row."""

    max_restores: int = Field(default=4, ge=1)
    """The run stops where the same snapshot would have to be put back more often than this: nothing leads on from it."""

    min_learning_rate_factor: float = Field(default=1 / 16, gt=0, le=1)
    """Halving goes no further than this share of the schedule's learning rate, (0, 1]."""

    @field_validator("*")
    @classmethod
    def _stop_lies_beyond_watch(cls, stop: object, info: ValidationInfo) -> object:
        name, _, which = (info.field_name or "").rpartition("_")
        watch = info.data.get(f"{name}_watch")
        if which != "stop" or not isinstance(stop, float) or watch is None:
            return stop
        side, is_wrong = ("above", stop > watch) if name in LOW_IS_BAD else ("below", stop < watch)
        if is_wrong:
            raise ValueError(f"must not be {side} guards.{name}_watch, which is {watch:g} (got {stop:g})")
        return stop

    def limits(self, alarm: str) -> tuple[float | None, float | None]:
        """Where an alarm's `watch` and `stop` begin; None where a limit is off."""
        return getattr(self, f"{alarm}_watch"), getattr(self, f"{alarm}_stop", None)
