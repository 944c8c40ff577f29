"""The section `data`: prompts for training and evaluation. Imports no torch."""

from typing import Any

from pydantic import Field, field_validator

from ...section import Section
from .functions import UserFunction, check_name_or_spec


class DataConfig(Section):
    """Prompts for training and evaluation."""

    train: str | None = None
    """Training rows: a .json, .jsonl, .parquet or .csv file, an id on the Hub, `reasoning_gym:<task>`, or a function that
    returns rows (`file.py:name`, `package.module:name`). None: the `train_dataset` of `GRPOTrainer`."""

    eval: str | None = None
    """Evaluation rows, in the same forms. None: no evaluation."""

    subset: str | None = None
    """Subset (configuration name) of a data set on the Hub, such as `main` of openai/gsm8k. None: its only one."""

    train_split: str = "train"
    """Split of a data set on the Hub for training."""

    eval_split: str = "test"
    """Split of a data set on the Hub for evaluation."""

    prompt_column: str = "prompt"
    """Column with the prompt: text, or a conversation (a list of messages with role and content)."""

    system_prompt: str | None = None
    """System message before each prompt; turns a text prompt into a conversation, so that the chat template applies."""

    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Keyword arguments of the tokenizer's chat template, such as `enable_thinking: false`."""

    shuffle: bool = True
    """Draw prompts in a random order that depends on `seed`, different in each epoch (TRL's `shuffle_dataset`)."""

    shuffle_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of the order alone, 0 to 2**32 - 1 (TRL's `data_seed`). None: `seed`."""

    sampler: UserFunction | None = None
    """A function from a step, a number and the training prompts to the indices of that many of them, the prompts of the step:
    `path/to/file.py:name` or `package.module:name`, in Python also the function itself (docs/extending.md). It replaces
    `shuffle`. None: every epoch has each row once."""

    eval_rows: int | None = Field(default=None, ge=1)
    """Evaluate on the first `eval_rows` rows only. None: all."""

    options: dict[str, Any] = Field(default={})
    """Options of a `reasoning_gym:<task>` source (`size`, `seed` and those of the task), or keyword arguments of a function."""

    @field_validator("sampler")
    @classmethod
    def _your_sampler(cls, value: UserFunction | None) -> UserFunction | None:
        if value is not None:
            check_name_or_spec(value)
        return value
