"""The section `data` of a run's configuration: prompts to train on and to evaluate with. Imports no torch."""

from typing import Any

from pydantic import Field

from ...section import Section


class DataConfig(Section):
    """Prompts to train on and to evaluate with."""

    train: str | None = None
    """Training rows: a .json, .jsonl, .parquet or .csv file, a hub id, `reasoning_gym:<task>`, or a function that
    returns rows (`file.py:name`, `package.module:name`). None: the data set handed to `GRPOTrainer`."""

    eval: str | None = None
    """Evaluation rows, named in the same ways. None: no evaluation."""

    subset: str | None = None
    """Subset (configuration name) of a hub id, such as `main` of openai/gsm8k. None: its only one."""

    train_split: str = "train"
    """Split of a hub id to train on."""

    eval_split: str = "test"
    """Split of a hub id to evaluate on."""

    prompt_column: str = "prompt"
    """Column that holds the prompt: text, or a conversation (a list of role and content)."""

    system_prompt: str | None = None
    """System message put before each prompt; makes a conversation of a text prompt."""

    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Keywords for the tokenizer's chat template, such as `enable_thinking: false`."""

    shuffle: bool = True
    """Draw prompts in a random order that `seed` decides, a new one each epoch (TRL's `shuffle_dataset`)."""

    eval_rows: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many rows only. None: on all."""

    options: dict[str, Any] = Field(default={})
    """Options of a `reasoning_gym:<task>` source: `size`, `seed` and the task's own."""
