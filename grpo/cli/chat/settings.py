"""How the answers of a chat are sampled.

    settings = Settings(temperature=0.7, top_p=1.0, max_tokens=64)
    sampling = sampling_of(settings, config.rollout)        # everything else as in training
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from ....rollout.config import RolloutConfig, SamplingConfig
from ...config.loading import describe_errors
from ...config.run_config import known_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`max_tokens`: of an answer, or of an episode. `seed`: None: other answers each time."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None = None


def sampling_of(settings: Settings, rollout: RolloutConfig) -> SamplingConfig:
    """Sampling as in training apart from the settings.

    Raises:
        ValueError: a setting is invalid, or the engine cannot sample like this.
    """
    try:
        sampling = rollout.as_in_training(
            1, temperature=settings.temperature, top_p=settings.top_p, max_completion_length=settings.max_tokens
        )
    except ValidationError as error:
        raise ValueError(describe_errors(error, known_keys())) from None
    rollout.check(sampling, section="")
    return sampling
