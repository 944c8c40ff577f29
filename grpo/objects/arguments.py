"""The arguments of `GRPOTrainer` that TRL has and a run needs as configuration or as reward functions.

    config, functions = resolve_arguments(config, model=model, reward_funcs=[classifier], peft_config=peft_config)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...rewards.loading import RewardSpec
from ..config import GRPOConfig
from .given import from_objects
from .rewards import RewardFunction, Tokenizer, reward_functions
from .unsupported import check_unsupported

Model = str | PreTrainedModel | PeftModel
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
RewardFunctions = RewardFunction | Sequence[RewardFunction]
RewardTokenizers = Tokenizer | Sequence[Tokenizer]


def resolve_arguments(
    config: GRPOConfig,
    *,
    model: Model | None = None,
    reward_funcs: RewardFunctions | None = None,
    processing_class: ProcessingClass | None = None,
    reward_processing_classes: RewardTokenizers = None,
    optimizers: tuple[object, object] | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    peft_config: PeftConfig | None = None,
) -> tuple[GRPOConfig, list[RewardSpec] | None]:
    """The configuration with these arguments, and the reward functions; None for those of the configuration.

    Raises:
        TypeError, ValueError: an argument is not supported, or contradicts another one; the message says what to do.
    """
    check_unsupported(optimizers)
    functions = reward_functions(reward_funcs, reward_processing_classes)
    given = from_objects(
        config,
        model=model,
        peft_config=peft_config,
        quantization_config=quantization_config,
        processing_class=processing_class,
    )
    return given.config, functions


def functions_of_sets(given: Mapping[str, RewardFunctions] | None) -> dict[str, list[RewardSpec]] | None:
    """The reward functions of evaluation sets, by name; None for those of the configuration.

    Raises:
        ValueError: a set has none.
    """
    if given is None:
        return None
    functions = {name: reward_functions(of_set) or [] for name, of_set in given.items()}
    if empty := [name for name, of_set in functions.items() if not of_set]:
        raise ValueError(f"eval_reward_funcs: {empty[0]!r} has no functions: leave it out for those of the run")
    return functions
