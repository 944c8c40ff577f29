"""The configuration of a run. Imports no torch; see `run_config.py`."""

from ...rewards.config import RewardFunction
from .files import dump_config, load_config, make_config
from .run_config import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    CorrectionConfig,
    DataConfig,
    GRPOConfig,
    GuardsConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardsConfig,
    RolloutConfig,
    eval_sampling,
    resolve_epochs,
    with_options,
)

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
    "eval_sampling",
    "load_config",
    "make_config",
    "resolve_epochs",
    "with_options",
]
