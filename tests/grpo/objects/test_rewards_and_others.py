"""Reward functions that are models, and arguments that are refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from trl.trainer.grpo_trainer import GRPOTrainer as TrlTrainer

from rankup.grpo.config.trl.trainer_arguments import TRAINER_ARGUMENTS
from rankup.grpo.objects.rewards import reward_functions
from rankup.grpo.objects.unsupported import check_unsupported
from rankup.rewards.classifier import SequenceClassifier


def score(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def classifier(tiny_model_path) -> Any:
    """A reward model, as a script loads it; its weights are those of the causal model, and its head is random."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(tiny_model_path("llama"), num_labels=1)


@pytest.fixture
def tokenizer(tiny_model_path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_path("llama"))


def test_functions_and_names_are_unchanged():
    assert reward_functions(None) is None
    assert reward_functions(score) == [score]
    assert reward_functions([score, "last_integer", "org/model"], [None, None, None]) == [score, "last_integer", "org/model"]


def test_a_model_is_a_reward_function(classifier: Any, tokenizer: Any):
    functions = reward_functions([score, classifier], [tokenizer, tokenizer])
    assert functions is not None and functions[0] is score
    assert isinstance(functions[1], SequenceClassifier) and functions[1].tokenizer is tokenizer
    alone = (reward_functions(classifier, tokenizer) or [])[0]
    assert isinstance(alone, SequenceClassifier)
    assert alone(prompts=["a"], completions=["b"]) == functions[1](prompts=["a"], completions=["b"])


def test_a_tokenizer_belongs_to_a_model_by_name_too(tiny_model_path, tokenizer: Any):
    functions = reward_functions([str(tiny_model_path("llama")), "last_integer"], [tokenizer, tokenizer])
    assert functions is not None
    assert isinstance(functions[0], SequenceClassifier) and functions[0].tokenizer is tokenizer
    assert functions[1] == "last_integer"


def test_tokenizers_are_as_many_as_functions(classifier: Any, tokenizer: Any):
    with pytest.raises(ValueError, match=r"must be as many as reward_funcs, which are 2 \(got 1\)"):
        reward_functions([score, classifier], tokenizer)
    with pytest.raises(ValueError, match="need the models as reward_funcs, too"):
        reward_functions(None, [tokenizer])
    with pytest.raises(TypeError, match=r"must be tokenizers \(got str\)"):
        reward_functions([classifier], ["some/tokenizer"])  # type: ignore[list-item]


# ----------------------------------------------------------------------------------------------- unsupported arguments


def test_arguments_without_a_value_are_accepted():
    check_unsupported((None, None))
    check_unsupported(None)


def test_an_optimizer_is_refused_with_the_options_that_replace_it():
    with pytest.raises(ValueError, match=r"optimizers: .* set optim.optimizer, optim.learning_rate and optim.lr_sch"):
        check_unsupported((object(), None))
    with pytest.raises(ValueError, match="optimizers: "):
        check_unsupported((None, object()))


def test_the_table_has_every_argument_of_trl():
    assert list(TRAINER_ARGUMENTS) == [name for name in inspect.signature(TrlTrainer.__init__).parameters if name != "self"]
