"""The section `data`: prompts for training and evaluation. Imports no torch."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from ...rollout.config import MAX_COMPLETIONS
from ...section import Section
from .functions import UserFunction, check_name_or_spec

ColumnType = Literal["str", "int", "float", "bool", "json"]


# Tags, so that an error message is about the form that was written only.


def _form(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<source>"


def _form_of_sets(value: object) -> str:
    return "<mapping>" if isinstance(value, dict) else _form(value)


def _form_of_set(value: object) -> str:
    return "<options>" if isinstance(value, dict | EvalSet) else _form(value)


_Source = Annotated[str, Tag("<source>")]
_List = Annotated[list[str], Tag("<list>"), Field(min_length=1)]

Sources = Annotated[_Source | _List, Discriminator(_form)]
"""The name of a source, or several whose rows follow each other."""


class EvalSet(Section):
    """An evaluation set with options of its own. None: those of the section `data`."""

    source: Sources
    """Its rows, as in `data.train`."""

    subset: str | None = None
    """As `data.subset`."""

    split: str | None = None
    """As `data.eval_split`."""

    rows: int | None = Field(default=None, ge=1)
    """As `data.eval_rows`."""

    prompt_column: str | None = None
    """As `data.prompt_column`."""

    system_prompt: str | None = None
    """As `data.system_prompt`."""

    options: dict[str, Any] | None = None
    """As `data.options`."""


EvalSources = Annotated[
    _Source
    | _List
    | Annotated[
        dict[str, Annotated[_Source | _List | Annotated[EvalSet, Tag("<options>")], Discriminator(_form_of_set)]],
        Tag("<mapping>"),
    ],
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


def _is_greedy(samples: int | None, temperature: float | None) -> bool:
    return temperature == 0 or (temperature is None and samples is None)


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
    one by one (`eval_<name>_reward`). A named set may be a mapping with its own options. None: no evaluation."""

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

    eval_samples: int | None = Field(default=None, ge=1, le=MAX_COMPLETIONS)
    """Completions of each evaluation prompt, with the same random numbers each time (TRL's `num_generations_eval`). None: one,
    which is greedy (the likeliest token each time) unless `eval_temperature` is set. Reward functions that compare the
    completions of a prompt need at least two."""

    eval_temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature of evaluations; 0: greedy. None: `rollout.temperature` if `eval_samples` is set, else greedy."""

    eval_top_p: float | None = Field(default=None, gt=0, le=1)
    """Probability mass to sample from in evaluations, (0, 1]. None: `rollout.top_p`. Not for greedy ones."""

    eval_pass_reward: float = 1.0
    """A completion passes if its reward is at least this (`eval_pass@k`, `eval_maj@n`)."""

    options: dict[str, Any] = Field(default={})
    """Options of a `reasoning_gym:<task>` source (`size`, `seed` and those of the task), or keyword arguments of a function."""

    @field_validator("eval", mode="before")
    @classmethod
    def _options_belong_to_a_name(cls, sources: object) -> object:
        if isinstance(sources, dict) and "source" in sources and sources.keys() <= EvalSet.model_fields.keys():
            raise ValueError("a set with options needs a name: write {NAME: {source: ...}}")
        return sources

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

    @field_validator("eval_temperature")
    @classmethod
    def _several_completions_differ(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        samples = info.data.get("eval_samples")
        if temperature == 0 and samples is not None and samples > 1:
            raise ValueError(f"must be above 0 for eval_samples {samples}: at 0 all of them are equal")
        return temperature

    @field_validator("eval_top_p")
    @classmethod
    def _greedy_evaluations_draw_nothing(cls, top_p: float | None, info: ValidationInfo) -> float | None:
        if top_p is not None and _is_greedy(info.data.get("eval_samples"), info.data.get("eval_temperature")):
            raise ValueError(
                "has no effect on greedy evaluations: set eval_samples or an eval_temperature above 0, or leave it out"
            )
        return top_p

    @property
    def is_eval_greedy(self) -> bool:
        """Whether evaluations take the likeliest token each time."""
        return _is_greedy(self.eval_samples, self.eval_temperature)

    def of_eval_set(self, one: EvalSet) -> "DataConfig":
        """The section with the options of an evaluation set that has its own."""
        own = {
            "subset": one.subset,
            "eval_split": one.split,
            "eval_rows": one.rows,
            "prompt_column": one.prompt_column,
            "system_prompt": one.system_prompt,
            "options": one.options,
        }
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})
