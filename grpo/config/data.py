"""The section `data`: prompts for training and evaluation. Imports no torch."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from ...section import Section
from .functions import UserFunction, check_name_or_spec

ColumnType = Literal["str", "int", "float", "bool", "json"]


# Tags, so that an error message is about the form that was written only.


def _form(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<source>"


def _form_of_sets(value: object) -> str:
    return "<mapping>" if isinstance(value, dict) else _form(value)


_Source = Annotated[str, Tag("<source>")]
_List = Annotated[list[str], Tag("<list>"), Field(min_length=1)]

Sources = Annotated[_Source | _List, Discriminator(_form)]
"""The name of a source, or several whose rows follow each other."""

EvalSources = Annotated[
    _Source | _List | Annotated[dict[str, Sources], Tag("<mapping>")],
    Discriminator(_form_of_sets),
]


def check_set_names(names: Collection[object]) -> None:
    """Check the names of evaluation sets: they become part of the names of metrics, `eval_<name>_reward`.

    Raises:
        ValueError: there is none; one is empty, no text, or has a slash or white space.
    """
    if not names:
        raise ValueError("the mapping of evaluation sets is empty: name at least one, or leave it out")
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or any(map(str.isspace, name)):
            raise ValueError(
                f"an evaluation set cannot be called {name!r}, since metrics are named after it: use a text without slashes "
                "and white space"
            )


def check_encoding(name: str) -> None:
    """Raise a ValueError if Python knows no text encoding of this name."""
    try:
        "a".encode(name)
    except LookupError as error:
        raise ValueError(f"Python knows no encoding {name!r}: use a name such as utf-8, latin-1, cp1252 or utf-16") from error


class DataConfig(Section):
    """Prompts for training and evaluation."""

    train: Sources | None = None
    """Training rows: a data file, a folder, a pattern such as `part-*.jsonl.gz`, an id on the Hub, `reasoning_gym:<task>`, or a
    function that returns rows (`file.py:name`, `package.module:name`); or a list of such sources (docs/data.md). None: the
    `train_dataset` of `GRPOTrainer`, or no rows: `reset` of the environment returns the prompts."""

    eval: EvalSources | None = None
    """Evaluation rows, in the same forms; or a mapping of names to such sources, which are evaluated together and also reported
    one by one (`eval_<name>_reward`). None: no evaluation."""

    subset: str | None = None
    """Subset (configuration name) of a data set on the Hub or in a folder, such as `main` of openai/gsm8k. None: its only
    one."""

    train_split: str = "train"
    """Split for training, or a part of it as `datasets` writes it: `train[:1000]`, `train[10%:20%]`, `train+validation`. A
    single file has one split, called `train` or `test`."""

    eval_split: str = "test"
    """Split for evaluation, in the same forms. A `DatasetDict` as `eval_dataset` is evaluated with all of its splits."""

    column_types: dict[str, ColumnType] = Field(default={})
    """Types of columns: `{answer: int}` reads the text "007" as 7. Types are str, int, float, bool and json (lists and
    objects). Without it, cells of CSV files are text, and all other values keep their types."""

    encoding: str = "utf-8"
    """Encoding of data files of text, such as latin-1 or utf-16."""

    prompt_column: str = "prompt"
    """Column with the prompt: text, or a conversation (a list of messages with role and content, also as JSON text)."""

    system_prompt: str | None = None
    """System message before each prompt; turns a text prompt into a conversation, so that the chat template applies."""

    chat_template: str | None = Field(default=None, min_length=1)
    """Chat template in place of the tokenizer's: a file (in a run file looked up beside it too), or the Jinja text itself. The
    run's `config.yaml` has the text, and the tokenizers that it saves have it as theirs. None: the tokenizer's own."""

    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Keyword arguments of the chat template, such as `enable_thinking: false`. Those of a row, in a column
    `chat_template_kwargs`, take precedence."""

    on_bad_row: Literal["stop", "drop"] = "stop"
    """What to do with a row whose prompt cannot be trained on: it is empty, neither text nor conversation, has parts other than
    text or no valid Unicode, is refused by the chat template, or has a token that the model does not know. `stop`: an error
    that names the row; `drop`: leave such rows out, with their number and reasons in a note and in `summary.json`."""

    shuffle: bool = True
    """Draw prompts in a random order that depends on `seed`, different in each epoch (TRL's `shuffle_dataset`)."""

    shuffle_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of the order alone, 0 to 2**32 - 1 (TRL's `data_seed`). None: `seed`."""

    sampler: UserFunction | None = None
    """A function from a step, a number and the training prompts to the indices of that many of them, the prompts of the step:
    `path/to/file.py:name` or `package.module:name`, in Python also the function itself (docs/extending.md). It replaces
    `shuffle`. None: every epoch has each row once."""

    eval_rows: int | None = Field(default=None, ge=1)
    """Evaluate on the first `eval_rows` rows of each set only. None: all, also of a data set without a length."""

    options: dict[str, Any] = Field(default={})
    """Options of a `reasoning_gym:<task>` source (`size`, `seed` and those of the task), or keyword arguments of a function."""

    @field_validator("eval")
    @classmethod
    def _sets_have_names(cls, sources: EvalSources | None) -> EvalSources | None:
        if isinstance(sources, dict):
            check_set_names(sources)
        return sources

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        check_encoding(value)
        return value

    @field_validator("sampler")
    @classmethod
    def _your_sampler(cls, value: UserFunction | None) -> UserFunction | None:
        if value is not None:
            check_name_or_spec(value)
        return value
