"""The configuration of a run: `GRPOConfig`. `files.py` reads and writes it.

    config = GRPOConfig(learning_rate=1e-4, num_generations=8, output_dir="runs/mine")  # TRL's flat names
    config = GRPOConfig(optim=OptimConfig(learning_rate=1e-4))                          # the same, section by section
    config = resolve_epochs(config, rows=1000)                                          # once the data is loaded
    config = with_options(config, {"lora": {"rank": 16}}, notes=["..."])                # checked again as a whole

Each section is defined in a file named after it, `rollout` and `rewards` in the packages that they configure. A configuration
is frozen. All mistakes are reported in one `ValueError`, one line each. Nothing here imports torch.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ...rewards.config import RewardsConfig
from ...rollout.config import RolloutConfig, SamplingConfig
from ...section import Section
from .algorithm import COMMON, AlgorithmConfig, CorrectionConfig
from .checkpoint import CheckpointConfig
from .cluster import ClusterConfig
from .data import DataConfig
from .guards import GuardsConfig
from .loading import KnownKeys, by_section, describe_errors, read
from .logging import LoggingConfig
from .lora import LoraConfig
from .model import ModelConfig
from .optim import OptimConfig
from .trl.arguments import Arguments

MAX_NUM_SEQS = 256
"""Upper bound of the default of `rollout.max_num_seqs`."""


DERIVED_DEFAULTS = {"algorithm": tuple(COMMON), "correction": ("cap", "veto")}
"""Options whose default depends on another option: `algorithm.loss_type` or `correction.mode`."""


class GRPOConfig(Section):
    """The complete configuration of a run.

    Accepts sections (`optim=OptimConfig(...)` or `optim={...}`), flat names that occur in only one section
    (`learning_rate=1e-4`), every name of TRL (`gradient_accumulation_steps=4`, see docs/trl.md), and `model="name"`.
    Raises ValueError with one line per problem.
    """

    model: ModelConfig = ModelConfig()
    """The base model; a string sets its name."""

    lora: LoraConfig = LoraConfig()
    """The adapter."""

    rollout: RolloutConfig = RolloutConfig()
    """Sampling with vLLM."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    """The objective."""

    correction: CorrectionConfig = CorrectionConfig()
    """Importance weights for the mismatch between sampler and trainer."""

    guards: GuardsConfig = GuardsConfig()
    """Alarms and their actions."""

    optim: OptimConfig = OptimConfig()
    """Optimizer, schedule and batch size."""

    rewards: RewardsConfig = RewardsConfig()
    """Reward functions, where they run, and how failures are handled."""

    data: DataConfig = DataConfig()
    """Prompts for training and evaluation."""

    logging: LoggingConfig = LoggingConfig()
    """Run folder, evaluation and display."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving, so that a run can be resumed."""

    cluster: ClusterConfig = ClusterConfig()
    """Several devices that share every step."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed for the data order, the adapter's initialisation and sampling, 0 to 2**32 - 1."""

    deterministic: bool = False
    """Repeat a seeded run bit-exactly on CUDA too (docs/runs.md): slower algorithms in the backward pass, and plain products
    for the adapter in vLLM (`rollout.lora_path` dense). On CPU a seeded run is repeated bit-exactly without it."""

    @model_validator(mode="after")
    def _the_engine_can_sample_like_this(self) -> "GRPOConfig":
        self.rollout.check()
        self.rollout.check(eval_sampling(self), section="data.eval_")
        return self

    @model_validator(mode="after")
    def _functions_of_sets_have_a_set(self) -> "GRPOConfig":
        sets = self.data.eval
        if sets is not None and self.rewards.eval_functions:  # the sets may be passed to the trainer in Python
            names = list(sets) if isinstance(sets, dict) else []
            if unknown := [name for name in self.rewards.eval_functions if name not in names]:
                named = f"data.eval has {', '.join(names)}" if names else "the set of data.eval has none: write {NAME: SOURCE}"
                raise ValueError(f"rewards.eval_functions.{unknown[0]}: no evaluation set has this name; {named}")
        return self

    @model_validator(mode="after")
    def _vllms_adapter_kernels_are_not_deterministic(self) -> "GRPOConfig":
        if self.deterministic and self.rollout.lora_path == "punica":
            raise ValueError(
                "rollout.lora_path: punica adds in an order that differs from run to run: with deterministic=true use auto or "
                "dense"
            )
        return self

    @model_validator(mode="after")
    def _penalty_is_within_the_length_limit(self) -> "GRPOConfig":
        soft_tokens, longest = self.algorithm.soft_overlong_tokens, self.rollout.max_completion_length
        if soft_tokens > longest:
            raise ValueError(
                f"algorithm.soft_overlong_tokens: must be at most rollout.max_completion_length, which is {longest} "
                f"(got {soft_tokens})"
            )
        if soft_tokens and self.algorithm.advantage_estimator == "maxrl":
            raise ValueError(
                "algorithm.soft_overlong_tokens: cannot be used with maxrl, which needs rewards of at least 0: leave it out or "
                "use another estimator"
            )
        if soft_tokens and self.algorithm.custom_advantages is not None:
            raise ValueError(
                "algorithm.soft_overlong_tokens: does not go with your own algorithm.advantage_estimator, which gets rewards "
                "without penalties: use the reward function soft_overlong instead"
            )
        return self

    @model_validator(mode="after")
    def _normalised_rewards_use_the_group_estimator(self) -> "GRPOConfig":
        if self.rewards.multi_objective_aggregation == "sum_then_normalize":
            return self
        if self.algorithm.advantage_estimator != "group":
            raise ValueError(
                "rewards.multi_objective_aggregation: normalize_then_sum has a different advantage formula: leave "
                f"algorithm.advantage_estimator at group (got {self.algorithm.estimator_name})"
            )
        if self.algorithm.soft_overlong_tokens:
            raise ValueError(
                "algorithm.soft_overlong_tokens: cannot be used with normalize_then_sum: use the reward function soft_overlong "
                "instead"
            )
        return self

    @model_validator(mode="after")
    def _every_worker_has_a_prompt(self) -> "GRPOConfig":
        if self.cluster.workers > self.optim.prompts_per_step:
            raise ValueError(
                "cluster.workers: must be at most optim.prompts_per_step, which is divided among them and is "
                f"{self.optim.prompts_per_step} (got {self.cluster.workers})"
            )
        return self

    @model_validator(mode="after")
    def _the_best_model_needs_evaluations(self) -> "GRPOConfig":
        if self.guards.load_best_model_at_end and not (self.logging.eval_steps or self.logging.eval_epochs):
            raise ValueError("guards.load_best_model_at_end: needs evaluations during training: set logging.eval_steps")
        return self

    _notes: tuple[str, ...] = PrivateAttr(default=())
    _has_trl_batch: bool = PrivateAttr(default=False)
    _given: Mapping[str, Any] = PrivateAttr(default={})
    """The values of TRL's names that a script gave and no option keeps."""

    def __init__(self, **values: Unpack[Arguments]) -> None:
        keys = known_keys()
        converted = by_section(values, keys)
        try:
            super().__init__(**converted.values)
        except ValidationError as error:
            raise ValueError(describe_errors(error, keys)) from None
        self._notes, self._has_trl_batch, self._given = converted.notes, converted.has_trl_batch, converted.given

    if not TYPE_CHECKING:  # for type checkers, only sections and `seed` are attributes

        def __getattr__(self, name: str) -> Any:
            """The value of an option by its flat name, or of a name of TRL, as its scripts read it: `args.output_dir`."""
            if name.startswith("_"):
                return super().__getattr__(name)
            section, _, field = (known_keys().locate(name) or "").partition(".")
            if field and hasattr(getattr(self, section), field):
                return getattr(getattr(self, section), field)
            return read(self, name, given=self._given)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the configuration: options and arguments that have no effect here, and the like."""
        return self._notes

    @property
    def has_trl_batch(self) -> bool:
        """Whether the batch was given in TRL's terms."""
        return self._has_trl_batch

    def to_dict(self) -> dict[str, Any]:
        """All options by section, in JSON types; for callbacks written for transformers."""
        return self.model_dump(mode="json")

    def to_json_string(self) -> str:
        """The same as JSON text."""
        return self.model_dump_json(indent=2)

    @property
    def completions_per_step(self) -> int:
        """Completions that are sampled in a step, without resampling."""
        return self.optim.prompts_per_step * self.rollout.num_generations

    @property
    def max_num_seqs(self) -> int:
        """Sequences that vLLM samples concurrently: `rollout.max_num_seqs`, else the completions of a step, at most 256."""
        return self.rollout.max_num_seqs or min(self.completions_per_step, MAX_NUM_SEQS)


def eval_sampling(config: GRPOConfig) -> SamplingConfig:
    """How evaluations sample."""
    data, rollout = config.data, config.rollout
    if data.is_eval_greedy:
        return rollout.greedy()
    return rollout.as_in_training(data.eval_samples or 1, temperature=data.eval_temperature, top_p=data.eval_top_p)


@functools.cache
def known_keys() -> KnownKeys:
    """All sections, fields and top-level keys of `GRPOConfig`."""
    sections: dict[str, tuple[str, ...]] = {}
    top_level: list[str] = []
    types: dict[str, Any] = {}
    for name, field in GRPOConfig.model_fields.items():
        types[name] = field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[name] = tuple(field.annotation.model_fields)
            types |= {f"{name}.{key}": option.annotation for key, option in field.annotation.model_fields.items()}
        else:
            top_level.append(name)
    return KnownKeys(sections=sections, top_level=tuple(top_level), types=types)


def resolve_epochs(config: GRPOConfig, *, rows: int) -> GRPOConfig:
    """The configuration with steps instead of epochs, for that many rows of training data.

    Every row is used equally often, up to the last step, which is a complete one.
    """
    lengths = {
        ("optim", "max_steps", "num_train_epochs"): config.optim.num_train_epochs,
        ("logging", "eval_steps", "eval_epochs"): config.logging.eval_epochs,
        ("checkpoint", "save_steps", "save_epochs"): config.checkpoint.save_epochs,
    }
    if not any(lengths.values()):
        return config
    options: dict[str, dict[str, Any]] = {}
    for (section, in_steps, in_epochs), epochs in lengths.items():
        if epochs is not None:
            steps = epochs * rows / config.optim.prompts_per_step
            # Rounded first: 0.1 * 30 is a little more than 3.
            steps = math.ceil(round(steps, 6)) if in_steps == "max_steps" else max(1, round(steps))
            options[section] = {in_epochs: None, in_steps: steps}
    return with_options(config, options)


def with_options(
    config: GRPOConfig, options: Mapping[str, Mapping[str, Any]], *, notes: Sequence[str] = ()
) -> GRPOConfig:
    """The configuration with these options of these sections set, and these notes added to its own.

    Raises:
        ValueError: one of them is invalid.
    """
    values: dict[str, Any] = {name: getattr(config, name) for name in GRPOConfig.model_fields}
    for section, changed in options.items():
        values[section] = {**values[section].model_dump(exclude_unset=True), **changed}
    result = GRPOConfig(**values)
    result._notes, result._has_trl_batch, result._given = (*config._notes, *notes), config._has_trl_batch, config._given
    return result
