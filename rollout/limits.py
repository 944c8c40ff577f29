"""What an engine cannot sample exactly, said before it is started. Imports no torch, and no vLLM.

    check_engine_limits(sampling, "vllm")       # ValueError: "rollout.temperature: must be 0.01 to 2 with vLLM (got 2.5)"

The limits of vLLM are those of its `SamplingParams`; a test holds them against the installed version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from .generation_kwargs import IN_BOTH_ENGINES

if TYPE_CHECKING:
    from .config import SamplingConfig

EngineName = Literal["vllm", "torch"]

VLLM_TEMPERATURES = (0.01, 2.0)
"""The temperatures of vLLM besides 0. It raises lower ones to 0.01 without an error."""

TORCH_MIN_TEMPERATURE = 1e-3
"""The lowest temperature besides 0 of the torch engine: below, the rounding of logits in fp32 (4e-6 at 50), divided by the
temperature, changes probabilities by more than 0.4 %."""


def check_engine_limits(sampling: SamplingConfig, engine: EngineName, *, section: str = "rollout.") -> None:
    """Whether the engine can sample like this.

    Args:
        section: what stands before the names of the options.

    Raises:
        ValueError: it cannot, or not exactly; one line for each option.
    """
    problems = [*_of_both(sampling), *(_of_vllm(sampling) if engine == "vllm" else _of_torch(sampling))]
    if problems:
        raise ValueError("\n".join(f"{section}{problem}" for problem in problems))


def _of_both(sampling: SamplingConfig) -> Iterator[str]:
    longest, kwargs = sampling.max_completion_length, sampling.generation_kwargs
    if kwargs.min_tokens > longest:
        yield (
            f"generation_kwargs.min_tokens: must be at most max_completion_length, which is {longest} (got {kwargs.min_tokens})"
        )


def _of_vllm(sampling: SamplingConfig) -> Iterator[str]:
    lowest, highest = VLLM_TEMPERATURES
    if sampling.temperature > highest or 0 < sampling.temperature < lowest:
        yield (
            f"temperature: must be {lowest:g} to {highest:g} with vLLM, which has no other ones "
            f"(got {sampling.temperature:.9g}); rollout.engine=torch samples from {TORCH_MIN_TEMPERATURE:g} on"
        )
    if sampling.temperature == 0 and sampling.num_generations > 1:
        yield f"num_generations: must be 1 at temperature 0, where all are equal (got {sampling.num_generations})"


def _of_torch(sampling: SamplingConfig) -> Iterator[str]:
    if 0 < sampling.temperature < TORCH_MIN_TEMPERATURE:
        yield (
            f"temperature: must be at least {TORCH_MIN_TEMPERATURE:g} (got {sampling.temperature:g}): rounding in fp32 "
            "would decide which token is sampled"
        )
    missing = ["repetition_penalty"] if sampling.repetition_penalty != 1.0 else []
    missing += [f"generation_kwargs.{name}" for name in sampling.generation_kwargs.given if name not in IN_BOTH_ENGINES]
    if missing:
        yield f"engine: torch has no {' and no '.join(missing)}: leave it out, or use vllm"
