"""The configuration of a run: `GRPOConfig`, read from a run file or made in Python.

    config = load_config("configs/quickstart.yaml", ["optim.max_steps=20", "seed=7"])   # a run file and overrides
    config = GRPOConfig(learning_rate=1e-4, num_generations=8, output_dir="runs/mine")  # TRL's flat names
    config = GRPOConfig(optim=OptimConfig(learning_rate=1e-4))                          # the same, section by section

The fields stand in `config_sections.py` and in `config_<section>.py` where a section has a file of its own. A configuration is
frozen: it does not change in a run. Every mistake is a `ValueError` with one line a problem. Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ...rewards.config import RewardFunction, RewardsConfig
from ...rollout.config import RolloutConfig
from ...section import Section
from .algorithm import COMMON, AlgorithmConfig, CorrectionConfig
from .checkpoint import CheckpointConfig
from .cluster import ClusterConfig
from .data import DataConfig
from .guards import GuardsConfig
from .loading import KnownKeys, apply_override, describe_errors, dump_yaml, nest, read_run_file
from .logging import LoggingConfig
from .lora import LoraConfig
from .model import ModelConfig
from .optim import OptimConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CorrectionConfig",
    "DataConfig",
    "GRPOConfig",
    "GuardsConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardFunction",
    "RewardsConfig",
    "RolloutConfig",
    "dump_config",
    "load_config",
]

MAX_NUM_SEQS = 256
"""Most sequences that vLLM samples at once unless `rollout.max_num_seqs` says otherwise."""


DERIVED_DEFAULTS = {"algorithm": tuple(COMMON), "correction": ("cap", "veto")}
"""Options that are the objective's or the mode's own unless they are given."""


class GRPOConfig(Section):
    """Everything that a run needs to know.

    Takes sections (`optim=OptimConfig(...)` or `optim={...}`), flat names where a name is in one section only
    (`learning_rate=1e-4`), some names of TRL that differ from ours (`reward_weights=[...]`), and `model="name"`.
    Raises ValueError with one line a problem.
    """

    model: ModelConfig = ModelConfig()
    """The base model. A string is its name."""

    lora: LoraConfig = LoraConfig()
    """The adapter."""

    rollout: RolloutConfig = RolloutConfig()
    """Sampling with vLLM."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    """The objective."""

    correction: CorrectionConfig = CorrectionConfig()
    """Weights for the gap between sampler and trainer."""

    guards: GuardsConfig = GuardsConfig()
    """Alarms, and what they do."""

    optim: OptimConfig = OptimConfig()
    """Optimizer, schedule and size of a step."""

    rewards: RewardsConfig = RewardsConfig()
    """Reward functions, where they run, and what their failures do."""

    data: DataConfig = DataConfig()
    """Prompts for training and evaluation."""

    logging: LoggingConfig = LoggingConfig()
    """Run folder, evaluation and what is shown."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    cluster: ClusterConfig = ClusterConfig()
    """Several devices."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of data order, adapter initialisation and sampling, 0 to 2**32 - 1."""

    _base_dir: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _penalty_fits_the_lengths(self) -> "GRPOConfig":
        soft_tokens, longest = self.algorithm.soft_overlong_tokens, self.rollout.max_completion_length
        if soft_tokens > longest:
            raise ValueError(
                f"algorithm.soft_overlong_tokens: must be at most rollout.max_completion_length, which is {longest} "
                f"(got {soft_tokens})"
            )
        if soft_tokens and self.algorithm.advantage_estimator == "maxrl":
            raise ValueError(
                "algorithm.soft_overlong_tokens: cannot go with maxrl, which takes rewards of at least 0: leave it out, or "
                "take another estimator"
            )
        return self

    @model_validator(mode="after")
    def _normalised_rewards_stand_alone(self) -> "GRPOConfig":
        if self.rewards.multi_objective_aggregation == "sum_then_normalize":
            return self
        if self.algorithm.advantage_estimator != "group":
            raise ValueError(
                "rewards.multi_objective_aggregation: normalize_then_sum makes advantages of its own: leave "
                f"algorithm.advantage_estimator at group (got {self.algorithm.advantage_estimator})"
            )
        if self.algorithm.soft_overlong_tokens:
            raise ValueError(
                "algorithm.soft_overlong_tokens: cannot go with normalize_then_sum: add the reward function soft_overlong "
                "in its place"
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

    def __init__(self, **values: Any) -> None:
        keys = known_keys()
        try:
            super().__init__(**nest(values, keys))
        except ValidationError as error:
            raise ValueError(describe_errors(error, keys)) from None

    @property
    def base_dir(self) -> Path | None:
        """Folder of the run file: reward and data paths that are not found from here are looked for there.
        None for a configuration made in Python; not part of the dump."""
        return self._base_dir

    def seen_from(self, base_dir: Path | None) -> "GRPOConfig":
        """The same, with another `base_dir`: a run file's folder has another path on another machine."""
        copy = self.model_copy()
        copy._base_dir = None if base_dir is None else base_dir.resolve()
        return copy

    @property
    def max_num_seqs(self) -> int:
        """Sequences that vLLM samples at once: `rollout.max_num_seqs`, else a step's completions, at most 256."""
        completions_per_step = self.optim.prompts_per_step * self.rollout.num_generations
        return self.rollout.max_num_seqs or min(completions_per_step, MAX_NUM_SEQS)


def known_keys() -> KnownKeys:
    """All sections, fields and top-level keys of `GRPOConfig`."""
    sections: dict[str, tuple[str, ...]] = {}
    top_level: list[str] = []
    for name, field in GRPOConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[name] = tuple(field.annotation.model_fields)
        else:
            top_level.append(name)
    return KnownKeys(sections=sections, top_level=tuple(top_level))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> GRPOConfig:
    """Read a run file (YAML) and apply overrides, `section.field=value` each, the value being YAML.

    `lora.targets=[q_proj, v_proj]`, `data.eval=null` and flat names (`learning_rate=1e-4`) all work. The last override
    of a key wins. A run without a name is named after its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: wrong YAML, unknown keys or wrong values; one line a problem.
    """
    path = Path(path)
    keys = known_keys()
    values = nest(read_run_file(path), keys)
    for override in overrides:
        apply_override(values, override, keys)
    logging = values.setdefault("logging", {})
    if logging.get("run_name") is None:
        logging["run_name"] = path.stem
    config = GRPOConfig(**values)
    config._base_dir = path.resolve().parent
    return config


def dump_config(config: GRPOConfig) -> str:
    """The whole configuration as YAML, defaults included; `load_config` reads it back to the same values.

    Null stands where `algorithm.loss_type` or `correction.mode` decides.
    """
    values = config.model_dump(mode="json")
    # What another option decides stays open, or a file with another `loss_type` would keep the values of this one.
    for section, names in DERIVED_DEFAULTS.items():
        given = getattr(config, section).model_fields_set
        values[section].update({name: None for name in names if name not in given})
    return dump_yaml(values)
