"""TRL's arguments `reward_funcs` and `reward_processing_classes`, with sequence classifiers as reward functions.

    functions = reward_functions([my_reward, classifier], [None, tokenizer])
    functions       # [my_reward, SequenceClassifier(classifier, tokenizer=tokenizer)]
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...rewards.classifier import SequenceClassifier
from ...rewards.loading import RewardSpec, load_reward

RewardFunction = RewardSpec | PreTrainedModel
Tokenizer = PreTrainedTokenizerBase | None


def reward_functions(
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None,
    reward_processing_classes: Tokenizer | Sequence[Tokenizer] = None,
) -> list[RewardSpec] | None:
    """The reward functions, as `UserInputs` takes them; None for those of the configuration.

    Tokenizers belong to the functions at the same places, and are ignored for those that are no classifiers.

    Raises:
        TypeError: a processing class is no tokenizer.
        ValueError: there are more or fewer of them than reward functions, or a model has not exactly one label.
    """
    if reward_funcs is None:
        if reward_processing_classes is not None:
            raise ValueError("reward_processing_classes: need the models as reward_funcs, too")
        return None
    functions: list[RewardFunction] = (
        [reward_funcs] if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) else list(reward_funcs)
    )
    given = [None] * len(functions) if reward_processing_classes is None else reward_processing_classes
    tokenizers = list(given) if isinstance(given, Sequence) else [given]
    if len(tokenizers) != len(functions):
        raise ValueError(
            f"reward_processing_classes: must be as many as reward_funcs, which are {len(functions)} (got {len(tokenizers)})"
        )
    return [_function(function, tokenizer) for function, tokenizer in zip(functions, tokenizers, strict=True)]


def _function(function: RewardFunction, tokenizer: Tokenizer) -> RewardSpec:
    if isinstance(function, PreTrainedModel):
        return SequenceClassifier(function, tokenizer=_checked(tokenizer))
    if isinstance(function, str) and tokenizer is not None and isinstance(load_reward(function), SequenceClassifier):
        return SequenceClassifier(function, tokenizer=_checked(tokenizer))
    return function


def _checked(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"reward_processing_classes: must be tokenizers (got {type(tokenizer).__name__})")
    return tokenizer
